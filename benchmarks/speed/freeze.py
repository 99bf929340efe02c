"""Step time with frozen layers, by truncated backwards, against Inductor with requires_grad=False from the start.

    python -m benchmarks.speed.freeze                      # an MLP, a GPT and a GPT with adapters on this machine
    python -m benchmarks.speed.freeze --smoke --out /tmp/x # seconds; checks that the benchmark itself works

Arms: `dense` (Inductor, nothing frozen); `oracle` (Inductor; what is frozen has requires_grad=False before compiling);
`frozen` (convaware, compiled and run with nothing frozen, then `session.freeze`). Goal: within 3 % of the oracle.
The oracle saves nothing below the cut in the forward pass; `frozen` runs the forward of the whole model, so the forward
is timed as well. Also counted: seconds of the first step after freezing, and of one after thawing and freezing again.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import cacompile
from benchmarks.lib.rows import RESULTS, Row, write_rows
from benchmarks.lib.timing import Spread, interleave, ratios, wall_clock
from examples.models import GPT

SYMBOLS = 84
GOAL = 1.03
RANK = 8
MEASURES = ("forward", "forward and backward", "whole step")


class Adapted(nn.Module):
    """A linear layer that is frozen for good, with a low-rank adapter beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Case(NamedTuple):
    """A model, what is frozen of it, a batch and a loss."""

    model: nn.Module
    frozen: Sequence[str]
    batch: Tensor
    loss: Callable[[nn.Module, Tensor], Tensor]


class Times(NamedTuple):
    """Seconds of one round."""

    forward: float
    both: float
    step: float


class Arm:
    """One copy of a model with its optimizer."""

    def __init__(self, case: Case, backend: str, *, frozen: Sequence[str] = ()) -> None:
        self.module, self.case = copy.deepcopy(case.model), case
        for name, param in self.module.named_parameters():
            if name in frozen:
                param.requires_grad_(False)
        self.model = torch.compile(self.module, backend=backend)
        self.optimizer = torch.optim.AdamW([p for p in self.module.parameters() if p.requires_grad], lr=1e-4)
        self.times: list[Times] = []

    def round(self) -> None:
        begin = time.perf_counter()
        loss = self.case.loss(self.model, self.case.batch)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.times.append(Times(forward - begin, backward - begin, time.perf_counter() - begin))


def mlp(args: argparse.Namespace) -> Case:
    width = args.width
    blocks = (nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)) for _ in range(6))
    batch = torch.randn(args.batch * args.context, width)
    return Case(nn.Sequential(*blocks), ["[0-3]"], batch, lambda model, x: model(x).square().mean())


def gpt(args: argparse.Namespace, adapters: bool = False) -> Case:
    model = GPT(SYMBOLS, width=args.width, depth=args.depth, heads=max(1, args.width // 64), context=args.context)
    if adapters:
        model.requires_grad_(False)
        for block in model.blocks:
            for module, name in ((block.attention, "qkv"), (block.attention, "out"), (block, "up"), (block, "down")):
                setattr(module, name, Adapted(getattr(module, name)))
    batch = torch.randint(0, SYMBOLS, (args.batch, args.context + 1))
    lower = [f"blocks.{i}" for i in range(args.depth // 2)]

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return Case(model, lower if adapters else ["token", "position", *lower], batch, loss)


def measure(name: str, case: Case, rounds: int) -> list[Row]:
    """All arms of one case; prints what was found."""
    frozen, dense = Arm(case, "convaware"), Arm(case, "inductor")
    frozen.round()
    session = cacompile.session(frozen.module)
    names = session.freeze(*case.frozen)
    oracle = Arm(case, "inductor", frozen=names)
    first = wall_clock(frozen.round)
    arms = {"frozen": frozen, "oracle": oracle, "dense": dense}
    for arm in arms.values():
        for _ in range(3):
            arm.round()
    session.thaw()
    frozen.round()
    session.freeze(*case.frozen)
    again = wall_clock(frozen.round)
    for arm in arms.values():
        arm.times.clear()
    runs: dict[str, Callable[[], None]] = {each: arm.round for each, arm in arms.items()}
    interleave(runs, rounds)
    rows: list[Row] = [
        (name, "frozen", "first step after freezing", "s", Spread.of([first])),
        (name, "frozen", "first step after freezing again", "s", Spread.of([again])),
    ]
    table = []
    for index, what in enumerate(MEASURES):
        seconds = {each: [times[index] for times in arm.times] for each, arm in arms.items()}
        rows += [(name, each, what, "s", Spread.of(values)) for each, values in seconds.items()]
        found = {base: ratios(seconds["frozen"], seconds[base]) for base in ("oracle", "dense")}
        rows += [(name, "frozen", what, f"ratio to {base}", spread) for base, spread in found.items()]
        most = ratios(seconds["oracle"], seconds["dense"])
        rows.append((name, "oracle", what, "ratio to dense", most))
        verdict = "meets" if found["oracle"].median <= GOAL else "misses"
        goal = f"{verdict} {GOAL}" if what != "forward" else ""
        table.append((what, *map(str, (found["oracle"], found["dense"], most)), goal))
    heads = ["measured", "frozen / oracle", "frozen / dense", "oracle / dense", "goal"]
    print(f"{name}: {len(names)} of {len(session.params)} parameters frozen")
    print(tabulate(table, headers=heads))
    print(f"first step after freezing {first:.2f} s, after freezing again {again:.3f} s\n")
    return rows


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--out", type=Path, default=RESULTS / "freeze_cpu.csv")
    parser.add_argument("--smoke", action="store_true", help="tiny models, three rounds")
    args = parser.parse_args(argv)
    if args.smoke:
        args.width, args.depth, args.context, args.batch, args.rounds = 64, 2, 16, 2, 3
    torch.manual_seed(0)
    size = f"width {args.width}, {args.batch * args.context} tokens, fp32"
    cases = {
        f"MLP of 6 blocks, 4 frozen, {size}": mlp(args),
        f"GPT of {args.depth} blocks, half frozen, {size}": gpt(args),
        f"GPT of {args.depth} blocks with adapters, half frozen, {size}": gpt(args, adapters=True),
    }
    rows = [row for name, case in cases.items() for row in measure(name, case, args.rounds)]
    print(f"median [quartiles] of {args.rounds} interleaved rounds, {torch.get_num_threads()} threads")
    write_rows(args.out, "freeze", rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
