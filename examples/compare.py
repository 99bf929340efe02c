"""Train one task in several arms, interleaved in one process, and say plainly what came of it.

Arms share seed, initial weights, data order and schedule. They take turns in chunks of a few steps, and who goes first
alternates, so that the machine's noise hits them alike and each pair of chunks gives one ratio of step times.
"""

from __future__ import annotations

import argparse
import ast
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from measuring import Graphs, cross_entropy, schedule, step_flops
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from show import measures, table, verdicts, write_csv, write_picture
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all arms train."""

    title: str
    build: Callable[[], nn.Module]
    batches: Callable[[], Iterator[tuple[Tensor, Tensor]]]
    """A new endless stream of (input, target) at each call, always the same."""
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    evaluate: Callable[[nn.Module], Tensor]
    """One score per validation batch, always the same batches."""
    score: str
    higher_is_better: bool = False


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to train the task: a backend with its options, for a number of steps."""

    name: str
    backend: str
    steps: int
    options: dict[str, Any] | None = None


class Run:
    """An arm under way: its model, data and optimizer, and what each step has shown."""

    def __init__(self, task: Task, arm: Arm, seed: int, warmup: float, device: str):
        if arm.backend == "convaware":
            import cacompile

            self.status = lambda: cacompile.status(self.compiled)
        else:
            self.status = None
        torch.manual_seed(seed)
        self.task, self.arm, self.warmup, self.device = task, arm, warmup, device
        self.model = task.build().to(device)
        self.optimizer = task.optimizer(self.model)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.compiled = torch.compile(self.model, backend=arm.backend, options=arm.options)
        self.batches = task.batches()
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.compiles: list[Graphs] = []
        self.flops: list[tuple[float, float]] = []
        """(saved, dense) weight-gradient FLOPs up to and including each step."""
        self.scores = torch.empty(0)

    def step(self) -> None:
        """One training step, timed from the forward pass to the end of the optimizer, hooks included."""
        x, y = (part.to(self.device) for part in next(self.batches))
        rate = schedule(len(self.losses), self.arm.steps, self.warmup)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate
        before = Graphs.so_far()
        start = time.perf_counter()
        loss = cross_entropy(self.compiled(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        if self.device != "cpu":
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.compiles.append(Graphs(*(now - then for now, then in zip(Graphs.so_far(), before, strict=True))))
        status = self.status() if self.status else None
        self.flops.append((status.saved_flops, status.dw_flops) if status else (0.0, 0.0))

    def finish(self) -> None:
        """Score the trained model, uncompiled: an evaluation must not show up among the recompiles."""
        self.model.eval()
        with torch.no_grad():
            self.scores = self.task.evaluate(self.model)
        self.model.train()

    @property
    def late(self) -> int:
        """The first step of the last tenth."""
        return self.arm.steps - max(1, self.arm.steps // 10)

    def skipped(self, start: int = 0, stop: int | None = None) -> float:
        """Share of the weight-gradient FLOPs of steps start..stop that were skipped."""
        saved, dense = np.diff([(0.0, 0.0), *self.flops], axis=0)[start:stop].sum(0)
        return float(saved / dense) if dense else 0.0

    def compile_seconds(self) -> float:
        """What the steps in which something was compiled took beyond the median step."""
        usual = median(self.seconds)
        return sum(max(0.0, took - usual) for took, new in zip(self.seconds, self.compiles, strict=True) if any(new))


def compare(task: Task, args: argparse.Namespace) -> list[Run]:
    """Run the arms, show progress, print the table with what it means, write picture and CSV to `args.out`."""
    begin = time.perf_counter()
    console = Console()
    if not console.is_terminal:  # a log need not be as narrow as an unknown terminal
        console = Console(width=120)
    args.out.mkdir(parents=True, exist_ok=True)  # so that a bad path shows before the work, not after it
    options = {"seed": args.seed, **args.option}
    if args.tolerance is not None:
        options["tolerance"] = args.tolerance
    arms = [
        Arm(name="Inductor", backend="inductor", steps=args.steps),
        Arm(
            name="convaware" if args.backend == "convaware" else f"{args.backend} again",
            backend=args.backend,
            steps=args.steps,
            options=options if args.backend == "convaware" else args.option or None,
        ),
    ]
    console.print(f"[bold]{task.title}[/bold], {args.steps} steps, seed {args.seed}, {torch.get_num_threads()} threads")
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        speed_estimate_period=60,
    )
    with bar, _deterministic():
        _wake_inductor()
        runs = [Run(task, arm, args.seed, args.warmup, args.device) for arm in arms]
        line = bar.add_task("compiling", total=args.steps * (3 if args.control else 2))
        interleave(runs, args.chunk, lambda: bar.update(line, advance=1, description=_progress(runs)))
        for run in runs:
            run.finish()
        note = None
        if args.control:
            base, ours = runs
            dense = step_flops(task.build(), next(task.batches())) * args.steps
            steps = round(args.steps * (1 - ours.flops[-1][0] / dense))
            left = 60 * args.minutes - (time.perf_counter() - begin)
            if steps >= args.steps:
                note = "No FLOPs were saved, so a shorter dense run would be the dense run itself: control left out."
            elif steps * median(base.seconds) > left:
                note = f"The compute-matched run of {steps} steps would end past --minutes {args.minutes:g}: left out."
            else:
                shorter = Arm(name="Inductor, fewer steps", backend="inductor", steps=steps)
                runs.append(Run(task, shorter, args.seed, args.warmup, args.device))
                bar.update(line, total=2 * args.steps + steps)
                interleave(runs[2:], args.chunk, lambda: bar.update(line, advance=1, description=_progress(runs[2:])))
                runs[2].finish()
        bar.update(line, total=bar.tasks[line].completed)
    rows = measures(task, runs, args.chunk)
    console.print(table(task, runs, rows))
    for sentence in [*verdicts(task, runs, args.chunk), *([note] if note else [])]:
        console.print(f"- {sentence}", highlight=False)
    write_csv(args.out, runs, rows)
    write_picture(args.out / "curves.png", task, runs)
    minutes = (time.perf_counter() - begin) / 60
    console.print(f"{minutes:.1f} minutes; curves.png, curves.csv and summary.csv are in {args.out}/", highlight=False)
    return runs


def interleave(runs: Sequence[Run], chunk: int, tick: Callable[[], object]) -> None:
    """Step all runs to their end, taking turns every `chunk` steps; who goes first alternates."""
    for turn, start in enumerate(range(0, runs[0].arm.steps, chunk)):
        for run in runs if turn % 2 == 0 else reversed(runs):
            for _ in range(min(chunk, run.arm.steps - start)):
                run.step()
                tick()


@contextmanager
def _deterministic() -> Iterator[None]:
    """Without it Inductor adds up the gradient of an embedding in any order, and no two arms agree bit for bit."""
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)


def _wake_inductor() -> None:
    """Compile something small, so that the first arm does not pay for what a process loads only once."""
    torch.compile(lambda x: (x * 2).sin().sum())(torch.ones(8, requires_grad=True)).backward()


def _progress(runs: Sequence[Run]) -> str:
    parts = [f"{run.arm.name} {np.mean(run.losses[-20:]):.3f}" for run in runs if run.losses]
    parts += [f"skipped {run.skipped(-20):.0%}" for run in runs if run.status and run.losses]
    return " · ".join(parts)


def parse(parser: argparse.ArgumentParser, smoke: dict[str, Any], argv: Sequence[str] | None) -> argparse.Namespace:
    """Add what all comparisons share and parse; with --smoke the values in `smoke` are the defaults."""
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of weights, data order and the draw of masks (default: %(default)s)")
    add("--warmup", type=float, default=0.1, help="share of the steps in which the rate rises (default: %(default)s)")
    add("--tolerance", type=float, help="convaware option: share of the expected descent that may be given up")
    add("--option", action="append", type=_option, default=[], metavar="NAME=VALUE", help="option of the backend")
    add("--backend", default="convaware", help="of the second arm; 'inductor' shows the noise of the comparison itself")
    add("--chunk", type=int, default=5, help="steps between the arms' turns (default: %(default)s)")
    add("--control", action=argparse.BooleanOptionalAction, default=True, help="the compute-matched third arm")
    add("--minutes", type=float, default=6, help="leave the third arm out if it would end later (default: %(default)s)")
    add("--device", default="cpu")
    add("--out", type=Path, default=Path("demo"), help="folder for picture and CSV (default: %(default)s)")
    add("--smoke", action="store_true", help="seconds instead of minutes; shows that it runs, no more")
    if parser.parse_args(argv).smoke:
        parser.set_defaults(**smoke)
    args = parser.parse_args(argv)
    args.option = dict(args.option)
    return args


def _option(text: str) -> tuple[str, Any]:
    """'name=value', the value a Python literal if it is one, else the text itself."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
