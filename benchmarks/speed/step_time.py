"""Step time against plain Inductor and against the static oracle, interleaved in one process.

    python -m benchmarks.speed.step_time                      # GPT of width 512 on this machine
    python -m benchmarks.speed.step_time --smoke --out /tmp/x # seconds; checks that the benchmark itself works

Arms: `inductor`; `dense` (convaware, nothing skipped); `keep p` (convaware, a mask pinned with that probability, drawn
anew each round); `turns k` (convaware, every group in each k-th step, in the controller's own turns); `oracle`
(Inductor; what convaware masks has requires_grad=False before compiling: the most that skipping dW can save). Two
measures: forward + backward, and the whole step with AdamW. The oracle's optimizer has fewer parameters to step, so the
first is what its goal is about. The last column is what the clock keeps of what FLOPs promise: the share of Inductor's
seconds that is saved over the share of a step's FLOPs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import cacompile
from benchmarks.lib.rows import RESULTS, Row, result_file, write_rows
from benchmarks.lib.timing import Spread, interleave, ratios
from cacompile.controller.turns import next_turns
from examples.models import GPT

SYMBOLS = 84


class Arm:
    """One model with its optimizer; `times` holds (forward + backward, whole step) in seconds for each round."""

    def __init__(
        self, model: nn.Module, backend: str, batch: Tensor, *, keep: float | None = None, turns: int | None = None
    ) -> None:
        self.model = torch.compile(model, backend=backend)
        self.keep = keep
        self.turns = turns
        self.phase = np.full(0, -1.0)
        self.batch = batch
        self.seeds = itertools.count()
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        self.times: list[tuple[float, float]] = []

    def round(self) -> None:
        if self.keep is not None:
            cacompile.session(self.model).pin(keep=self.keep, seed=next(self.seeds))
        if self.turns is not None:
            self.take_turns(cacompile.session(self.model), self.turns)
        begin = time.perf_counter()
        logits = self.model(self.batch[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), self.batch[:, 1:].flatten()).backward()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.times.append((middle - begin, time.perf_counter() - begin))

    def take_turns(self, session: cacompile.Session, turns: int) -> None:
        index, step = session.index, next(self.seeds)
        if not len(self.phase):
            self.phase = np.full(len(index.all), -1.0)
        keep = np.full(len(index.all), 1.0 / turns)
        on, self.phase = next_turns(keep, self.phase, index.turn, index.role, (0, step))
        if len(on):
            session.pin(mask=on)


def model_of(args: argparse.Namespace) -> GPT:
    torch.manual_seed(0)
    return GPT(SYMBOLS, width=args.width, depth=args.depth, heads=args.width // 64, context=args.context)


def build(args: argparse.Namespace) -> dict[str, Arm]:
    """All arms from the same initial weights, each compiled and warmed up."""
    batch = torch.randint(0, SYMBOLS, (args.batch, args.context + 1), generator=torch.Generator().manual_seed(0))
    model = functools.partial(model_of, args)
    arms = {"inductor": Arm(model(), "inductor", batch), "dense": Arm(model(), "convaware", batch)}
    for keep in args.keep:
        arms[f"keep {keep:g}"] = Arm(model(), "convaware", batch, keep=keep)
    for turns in args.turns:
        arms[f"turns {turns}"] = Arm(model(), "convaware", batch, turns=turns)
    frozen = model()
    masked = {row.param for row in cacompile.explain(frozen, batch[:, :-1]).rows if row.operation}
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_(name not in masked)
    arms["oracle"] = Arm(frozen, "inductor", batch)
    for arm in arms.values():
        for _ in range(3):
            arm.round()
        arm.times.clear()
    return arms


def skipped_share(arm: Arm) -> float:
    """Share of dW FLOPs that the arm's backwards left out; counted."""
    if arm.keep is None and arm.turns is None:
        return 0.0
    total, saved = cacompile.session(arm.model).flops
    return saved / total


def flops_saved(arm: Arm) -> float:
    """Share of all FLOPs of its steps, forward passes too, that the arm's backwards left out; counted."""
    if arm.keep is None and arm.turns is None:
        return 0.0
    session = cacompile.session(arm.model)
    return session.flops[1] / session.step_flops


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
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.75, 0.5, 0.25, 0.0])
    parser.add_argument("--turns", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--out", type=result_file, default=RESULTS / "step_time_cpu.csv")
    parser.add_argument("--smoke", action="store_true", help="tiny model, three rounds")
    args = parser.parse_args(argv)
    if args.smoke:
        args.width, args.depth, args.context, args.batch, args.rounds = 64, 1, 32, 2, 3
    case = f"GPT width {args.width} depth {args.depth} tokens {args.batch * args.context} fp32"

    arms = build(args)
    runs: dict[str, Callable[[], None]] = {name: arm.round for name, arm in arms.items()}
    interleave(runs, args.rounds)
    rows, table = [], []
    for index, measure in enumerate(("forward and backward", "whole step")):
        seconds = {name: [times[index] for times in arm.times] for name, arm in arms.items()}
        shares, medians = [], []
        for name, arm in arms.items():
            against = {base: ratios(seconds[name], seconds[base]) for base in ("inductor", "oracle")}
            rows.append((case, name, measure, "s", Spread.of(seconds[name])))
            rows += [(case, name, measure, f"ratio to {base}", spread) for base, spread in against.items()]
            saved = flops_saved(arm)
            rows.append((case, name, measure, "share of a step's FLOPs saved", Spread.of([saved])))
            clock = f"{(1.0 - against['inductor'].median) / saved:.2f}" if saved else ""
            table.append(
                (measure, name, f"{skipped_share(arm):.0%}", *map(str, against.values()), f"{saved:.1%}", clock)
            )
            if arm.keep is not None:
                shares.append(skipped_share(arm))
                medians.append(against["inductor"].median)
        if len(shares) > 1:
            slope, off = linearity([0.0, *shares], [1.0, *medians])
            print(
                f"{measure}: 1 {slope:+.3f} x share skipped, no point farther than {off:.3f} from the line (measured)"
            )
    print(tabulate(table, headers=["measured", "arm", "dW skipped", "time / Inductor", "time / oracle", "FLOPs saved",
                                   "seconds / FLOPs"]))  # fmt: skip
    print(f"median [quartiles] of {args.rounds} interleaved rounds, {case}, {torch.get_num_threads()} threads")
    found = {(arm, measure, unit): spread for _, arm, measure, unit, spread in rows}
    print("dense / Inductor:", verdict(found["dense", "forward and backward", "ratio to inductor"], 1.02))
    if 0.0 in args.keep:
        print("all off / oracle:", verdict(found["keep 0", "forward and backward", "ratio to oracle"], 1.10))
    write_rows(args.out, "step_time", rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
