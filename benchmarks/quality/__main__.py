"""Is skipping worth it, against the same money spent on the best dense run? Small models on public data.

    python -m benchmarks.quality choose                           # rates of the dense runs, on validation data
    python -m benchmarks.quality                                  # everything that is missing, then the report
    python -m benchmarks.quality --tasks gpt --arms dense,convaware --seeds 0
    python -m benchmarks.quality report                           # tables and plots from the rows that are there
    python -m benchmarks.quality report --tasks gpt --seeds 0     # of some on the screen, which leaves the files alone
    python -m benchmarks.quality tau                              # where GradES' threshold comes from
    python -m benchmarks.quality --smoke                          # seconds, to a temporary folder

Each run has one thread and one row in quality.csv: task, arm, seed, the split that quality was measured on, steps,
cost in training FLOPs (counted) and in seconds without compiling (measured), quality (minus the cross-entropy in nats),
accuracy, share of the dW FLOPs that were skipped. A run that has its row is not made again. `dense` and `convaware` of
one seed take turns every five steps, so that their seconds can be compared (column `beside`).
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.lib.rows import RESULTS
from benchmarks.quality.arms import ARMS, CHOSEN, DENSE, DEV_SEED, LENGTHS, RATES, SHARES, installed, rated
from benchmarks.quality.peers import weight_changes
from benchmarks.quality.plan import Settings, plan
from benchmarks.quality.report import report, show
from benchmarks.quality.rows import LOOK_COLUMNS, append, keys, read
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tuned import tuned
from benchmarks.quality.worker import spread

USUAL = (*CHOSEN, *(name for name in ARMS if name not in DENSE))
"""The arms that are run where none are named."""


def measure(tasks: Sequence[str], arms: Sequence[str], seeds: Sequence[int], settings: Settings,
            jobs: int, again: bool, console: Console) -> int:  # fmt: skip
    """Make the runs that are missing; gives how many failed."""
    settings.out.mkdir(parents=True, exist_ok=True)
    done = keys(read(settings.rows))
    if without := [name for name in arms if not installed(ARMS[name])]:
        console.print(f"left out, as what they need is not installed: {', '.join(without)}", highlight=False)
    wanted = [arm for arm in arms if arm not in without]
    parts = [
        part
        for task in tasks
        for part in plan([task], _at_their_rates(wanted, task, settings), seeds, settings, set() if again else done)
    ]
    runs = sum(len(turn.arms) for part in parts for turn in part.turns)
    console.print(f"{runs} runs to make, {len(done)} in {settings.rows}", highlight=False)
    bar = Progress(TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
                   TextColumn("ETA"), TimeRemainingColumn(), console=console, speed_estimate_period=60,
                   disable=not console.is_terminal)  # fmt: skip
    lines = {task: bar.add_task(task, total=sum(part.steps for part in parts if part.task == task))
             for task in dict.fromkeys(part.task for part in parts)}  # fmt: skip
    failed = 0
    with bar:
        for kind, what in spread(parts, jobs, settings):
            if kind == "step":
                bar.update(lines[what], advance=1)
            elif kind == "look":
                append(settings.looks, what, LOOK_COLUMNS)
            elif kind == "row":
                append(settings.rows, what)
                console.print(_sentence(what), highlight=False, soft_wrap=True)
            else:
                task, turn, text = what
                failed += len(turn.arms)
                console.print(f"[bold]failed[/bold]: {task}, {' and '.join(turn.arms)}, seed {turn.seed}")
                console.print(text, markup=False, highlight=False)
    return failed


def _at_their_rates(arms: Sequence[str], task: str, settings: Settings) -> list[str]:
    """Shorter dense runs and those with smaller batches at the rates that were chosen for them; the others as they are.

    The full dense run keeps the task's own, which is convaware's too.
    """
    if settings.split == "valid":
        return list(arms)
    rows, rungs = read(settings.rows), {*LENGTHS, *SHARES} - {"dense"}
    return [tuned(rows, task, arm, settings.steps(task, arm)) if arm in rungs else arm for arm in arms]


def _sentence(row: dict[str, Any]) -> str:
    parts = [f"{row['steps_taken']} steps", f"quality {row['quality']:.4f}", f"accuracy {row['accuracy']:.2%}",
             f"{row['cost_flops']:.4g} FLOPs", f"{row['cost_seconds']:.1f} s"]  # fmt: skip
    if row["skipped_share"]:
        parts.append(f"{row['skipped_share']:.1%} of dW skipped")
    return f"{row['task']} {row['arm']} seed {row['seed']}: {', '.join(parts)}"


def thresholds(settings: Settings, console: Console) -> None:
    """How much matrices move in a dense run of another seed, and what GradES would have skipped of it."""
    task = settings.task("gpt")
    changes = weight_changes(task, DEV_SEED, task.steps)
    weights = np.array([count for count, _ in changes.values()], float)
    moved = np.array([changed for _, changed in changes.values()])
    earliest = int(0.3 * task.steps)  # GradES' default alpha
    grid = Table("at", "median L1 change of a matrix in a step", "dW that GradES would skip with it",
                 title=f"{task.title}, dense, seed {DEV_SEED}, {task.steps} steps")  # fmt: skip
    for percent in range(40, 100, 5):
        tau = float(np.median(moved[:, percent * task.steps // 100]))
        below = moved < tau
        below[:, :earliest] = False
        skipped = weights @ np.logical_or.accumulate(below, axis=1) / weights.sum()
        grid.add_row(f"{percent} %", f"{tau:.4g}", f"{skipped.mean():.1%}")
    console.print(grid)


def _some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = {"all": list(known), "usual": list(USUAL)}.get(text) or text.split(",")
        if wrong := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(wrong)}; known: all, {', '.join(known)}")
        return names

    return parse


def _seeds(text: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"seeds are whole numbers from 0 on, separated by commas, got {text!r}")
    return [int(part) for part in text.split(",")]


def _jobs(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 on, got {text!r}")
    return int(text)


def _scale(text: str) -> float:
    try:
        scale = float(text)
    except ValueError:
        scale = math.nan
    if not 0.0 < scale < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return scale


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", nargs="?", choices=("run", "choose", "report", "tau"), default="run")
    add("--tasks", type=_some_of(list(TASKS)), help="comma-separated: all (default), " + ", ".join(TASKS))
    add("--arms", type=_some_of(list(ARMS)), default="usual", help="comma-separated; all, usual (default) or some of: "
        + ", ".join(ARMS))  # fmt: skip
    add("--seeds", type=_seeds, help=f"comma-separated (default: 0,1,2; choose: {DEV_SEED}; report: all)")
    add("--steps-scale", type=_scale, default=1.0, metavar="X", help="times the steps of every task")
    add("--split", choices=("test", "valid"), default="test", help="options are chosen on valid, reported is test")
    add("--jobs", type=_jobs, default=2, help="processes, of one thread each (default: %(default)s)")
    add("--out", type=Path, help="folder of rows, profiles, tables and plots (default: benchmarks/results)")
    add("--again", action="store_true", help="make runs again that have a row")
    add("--smoke", action="store_true", help="tiny models, few steps; shows that it runs, no more")
    args = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:  # a log need not be as narrow as an unknown terminal
        console = Console(width=200)
    with tempfile.TemporaryDirectory() if args.smoke and not args.out else nullcontext(RESULTS) as folder:
        if args.command == "choose":
            args.split, args.arms = "valid", [rated(rung, rate) for rung in CHOSEN for rate in RATES]
        seeds = args.seeds or ([DEV_SEED] if args.command == "choose" else [0, 1, 2])
        settings = Settings(out=args.out or Path(folder), split=args.split, scale=args.steps_scale, smoke=args.smoke)
        if args.command == "report":
            return _report(settings, args.tasks, args.seeds, console)
        if args.command == "tau":
            thresholds(settings, console)
            return 0
        tasks = args.tasks or list(TASKS)
        try:
            failed = measure(tasks, args.arms, seeds, settings, args.jobs, args.again, console)
        except KeyboardInterrupt:
            console.print(f"interrupted: what is done is in {settings.rows}, the same command goes on from there")
            return 130
        _print(report(settings, tasks), console)
    return int(failed > 0)


def _report(settings: Settings, tasks: Sequence[str] | None, seeds: Sequence[int] | None, console: Console) -> int:
    """Of some tasks or seeds on the screen; files are written of all."""
    some = tasks is not None or seeds is not None
    told = _print(show(settings, tasks or list(TASKS), seeds) if some else report(settings, list(TASKS)), console)
    if not told:
        console.print(f"{settings.rows} has no dense runs of these to report", highlight=False, soft_wrap=True)
    return int(not told)


def _print(lines: Iterable[str], console: Console) -> bool:
    """Whether there were any."""
    told = list(lines)
    for line in told:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return bool(told)


if __name__ == "__main__":
    sys.exit(main())
