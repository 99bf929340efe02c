"""Step time against plain Inductor and against the static oracle, interleaved in one process.

    python -m benchmarks.speed.step_time                      # GPT of width 512 on this machine
    python -m benchmarks.speed.step_time --model minilm       # MiniLM-L6 fine-tuned on batches of Rotten Tomatoes
    python -m benchmarks.speed.step_time --smoke --out /tmp/x # seconds; checks that the benchmark itself works

Arms: `inductor`; `dense` (convaware, nothing skipped); `keep p` (convaware, a mask pinned with that probability, drawn
anew each round); `turns k` (convaware, every group in each k-th step, in the controller's own turns); `oracle`
(Inductor; what convaware masks has requires_grad=False before compiling: the most that skipping dW can save). Two
measures: forward + backward, and the whole step with AdamW. The oracle's optimizer has fewer parameters to step, so the
first is what its goal is about. The last two columns are what the clock keeps of what FLOPs promise, the share of
Inductor's seconds that is saved over the share of a step's FLOPs, and of what the oracle saves in proportion.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import cacompile
from benchmarks.lib.rows import RESULTS, Row, result_file, write_rows
from benchmarks.lib.timing import Spread, interleave, ratios
from benchmarks.quality import snippets
from cacompile.controller.turns import next_turns
from examples.models import GPT

SYMBOLS = 84

FLOPS_KEPT, ORACLE_KEPT = "seconds saved / FLOPs saved", "seconds saved / the oracle's in proportion"


class Work(NamedTuple):
    """What is trained, and on which batch."""

    case: str
    build: Callable[[], nn.Module]
    """The same weights each time."""
    inputs: tuple[Tensor, ...]
    target: Tensor
    """int64, a class for each row of the logits."""


class Arm:
    """One model with its optimizer; `times` holds (forward + backward, whole step) in seconds for each round."""

    def __init__(
        self, model: nn.Module, backend: str, work: Work, *, keep: float | None = None, turns: int | None = None
    ) -> None:
        self.model = torch.compile(model, backend=backend)
        self.keep = keep
        self.turns = turns
        self.phase = np.full(0, -1.0)
        self.work = work
        self.seeds = itertools.count()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        self.times: list[tuple[float, float]] = []
        self.spent_before = np.zeros(3)

    def round(self, *, masked: bool = True) -> None:
        if masked and self.keep is not None:
            cacompile.session(self.model).pin(keep=self.keep, seed=next(self.seeds))
        if masked and self.turns is not None:
            self.take_turns(cacompile.session(self.model), self.turns)
        begin = time.perf_counter()
        logits = self.model(*self.work.inputs)
        F.cross_entropy(logits.flatten(0, -2), self.work.target.flatten()).backward()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.times.append((middle - begin, time.perf_counter() - begin))

    @property
    def spent(self) -> np.ndarray:
        """FLOPs so far of dW, of the dW that was left out, and of whole steps; float [3]."""
        if self.keep is None and self.turns is None:
            return np.zeros(3)
        session = cacompile.session(self.model)
        return np.array([*session.flops, session.step_flops], float)

    def take_turns(self, session: cacompile.Session, turns: int) -> None:
        index, step = session.index, next(self.seeds)
        if not len(self.phase):
            self.phase = np.full(len(index.all), -1.0)
        keep = np.full(len(index.all), 1.0 / turns)
        on, self.phase = next_turns(keep, self.phase, index.turn, index.role, (0, step))
        session.pin(mask=on)


def gpt(args: argparse.Namespace) -> Work:
    def build() -> GPT:
        torch.manual_seed(0)
        return GPT(SYMBOLS, width=args.width, depth=args.depth, heads=args.width // 64, context=args.context)

    batch = torch.randint(0, SYMBOLS, (args.batch, args.context + 1), generator=torch.Generator().manual_seed(0))
    case = f"GPT width {args.width} depth {args.depth} tokens {args.batch * args.context} fp32"
    return Work(case, build, (batch[:, :-1],), batch[:, 1:])


def minilm(args: argparse.Namespace) -> Work:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return snippets.Classifier(**({"num_hidden_layers": 1} if args.smoke else {}))

    *inputs, target = next(snippets.batches(0))
    return Work(f"MiniLM-L6 tokens {inputs[0].numel()} fp32", build, tuple(inputs), target)


MODELS = {"gpt": gpt, "minilm": minilm}


def build(work: Work, keeps: Sequence[float], turns: Sequence[int]) -> dict[str, Arm]:
    """All arms from the same initial weights, each compiled and warmed up."""
    arms = {"inductor": Arm(work.build(), "inductor", work), "dense": Arm(work.build(), "convaware", work)}
    for keep in keeps:
        arms[f"keep {keep:g}"] = Arm(work.build(), "convaware", work, keep=keep)
    for each in turns:
        arms[f"turns {each}"] = Arm(work.build(), "convaware", work, turns=each)
    frozen = work.build()
    masked = {row.param for row in cacompile.explain(frozen, *work.inputs).rows if row.operation}
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name not in masked)
    arms["oracle"] = Arm(frozen, "inductor", work)
    for arm in arms.values():
        for warm in (True, True, False, False, False):  # AdamW takes twice as long over moments that are all zeros
            arm.round(masked=not warm)
        arm.times.clear()
        arm.spent_before = arm.spent
    return arms


def left_out(arm: Arm) -> tuple[float, float]:
    """What the timed backwards left out, counted: share of dW FLOPs, and of all of their steps, forward passes too."""
    dw, saved, steps = arm.spent - arm.spent_before
    return (saved / dw, saved / steps) if saved else (0.0, 0.0)


def kept(time: float, flops: float, skipped: float, oracle: float) -> dict[str, float]:
    """What a clock keeps of what FLOPs promise, and of what the oracle saves in proportion to the dW skipped.

    time, oracle: over Inductor's; flops: share of a step's that is saved; skipped: share of dW.
    """
    if not skipped:
        return {}
    saved = 1.0 - time
    return {FLOPS_KEPT: saved / flops, ORACLE_KEPT: saved / (skipped * (1.0 - oracle))}


def linearity(shares: list[float], times: list[float]) -> tuple[float, float]:
    """Slope of a straight line through (share skipped, time ratio), and the largest distance from it."""
    slope, intercept = np.polyfit(shares, times, 1)
    return float(slope), float(np.abs(np.polyval((slope, intercept), shares) - times).max())


def verdict(spread: Spread, goal: float) -> str:
    """What the rounds say about a goal for a ratio, and whether they tell the two sides apart at all."""
    apart = "cannot be told apart" if spread.lower <= 1.0 <= spread.upper else "can be told apart"
    met = "meets" if spread.median <= goal else "misses"
    return f"{spread}, median {met} <= {goal}; the two {apart} (quartiles)"


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt", help="sizes are those of the GPT")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.0])
    parser.add_argument("--turns", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--out", type=result_file, help="default: step_time_cpu.csv or step_time_minilm_cpu.csv")
    parser.add_argument("--smoke", action="store_true", help="tiny model, three rounds")
    args = parser.parse_args(argv)
    if args.smoke:
        args.width, args.depth, args.context, args.batch, args.rounds = 64, 1, 32, 2, 3
    work = MODELS[args.model](args)
    case = work.case

    arms = build(work, args.keep, args.turns)
    runs: dict[str, Callable[[], None]] = {name: arm.round for name, arm in arms.items()}
    interleave(runs, args.rounds)
    rows, table = [], []
    for index, measure in enumerate(("forward and backward", "whole step")):
        seconds = {name: [times[index] for times in arm.times] for name, arm in arms.items()}
        oracle = ratios(seconds["oracle"], seconds["inductor"]).median
        shares, medians = [], []
        for name, arm in arms.items():
            against = {base: ratios(seconds[name], seconds[base]) for base in ("inductor", "oracle")}
            rows.append((case, name, measure, "s", Spread.of(seconds[name])))
            rows += [(case, name, measure, f"ratio to {base}", spread) for base, spread in against.items()]
            skipped, saved = left_out(arm)
            rows.append((case, name, measure, "share of a step's FLOPs saved", Spread.of([saved])))
            shares_kept = kept(against["inductor"].median, saved, skipped, oracle)
            rows += [(case, name, measure, unit, Spread.of([value])) for unit, value in shares_kept.items()]
            table.append((measure, name, f"{skipped:.0%}", *map(str, against.values()), f"{saved:.1%}",
                          *(f"{value:.2f}" for value in shares_kept.values())))  # fmt: skip
            if arm.keep is not None:
                shares.append(skipped)
                medians.append(against["inductor"].median)
        if len(shares) > 1:
            slope, off = linearity([0.0, *shares], [1.0, *medians])
            print(
                f"{measure}: 1 {slope:+.3f} x share skipped, no point farther than {off:.3f} from the line (measured)"
            )
    print(tabulate(table, headers=["measured", "arm", "dW skipped", "time / Inductor", "time / oracle", "FLOPs saved",
                                   FLOPS_KEPT, ORACLE_KEPT]))  # fmt: skip
    print(f"median [quartiles] of {args.rounds} interleaved rounds, {case}, {torch.get_num_threads()} threads")
    found = {(arm, measure, unit): spread for _, arm, measure, unit, spread in rows}
    print("dense / Inductor:", verdict(found["dense", "forward and backward", "ratio to inductor"], 1.02))
    if 0.0 in args.keep:
        print("all off / oracle:", verdict(found["keep 0", "forward and backward", "ratio to oracle"], 1.10))
    usual = "step_time_cpu.csv" if args.model == "gpt" else f"step_time_{args.model}_cpu.csv"
    write_rows(args.out or RESULTS / usual, "step_time", rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
