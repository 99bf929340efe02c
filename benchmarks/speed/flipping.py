"""Seconds of 100 steps in which what is frozen changes 8 times: `session.freeze` against what people do today.

    python -m benchmarks.speed.flipping                       # a GPT on this machine
    python -m benchmarks.speed.flipping --smoke --out /tmp/x  # checks that the benchmark itself works

LISA: embeddings are frozen, and two of the blocks are trained, drawn anew every 12 steps. Arms: `freeze` (convaware,
the schedule followed); `flip, compiled` (Inductor, requires_grad is set: Dynamo compiles again for each new set, and
runs the model eagerly beyond its limit); `flip, eager` (LISA by hand, no compiler); `drop gradients` (Inductor,
everything is computed and what is frozen gets None). Compilers' caches are off. `first` has the compiling in it,
`later` are 100 steps more, in which the same sets come again; arms run one after the other. All train the same: how
far weights are apart is shown, and what of the time went into setting what is frozen.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import cacompile
from benchmarks.lib.rows import RESULTS, Row, result_file, write_rows
from benchmarks.lib.timing import Spread, wall_clock
from cacompile.schedules import Follow, RandomLayers
from examples.models import GPT

SYMBOLS = 84
STEPS, EVERY = 100, 12
BELOW = ("token", "position")


class Arm:
    """One way to freeze, with a model of its own."""

    def __init__(self, name: str, model: nn.Module, schedule: RandomLayers, tokens: Tensor) -> None:
        self.name, self.module, self.schedule, self.tokens = name, copy.deepcopy(model), schedule, tokens
        for below in BELOW if name != "freeze" else ():
            self.module.get_submodule(below).requires_grad_(False)
        self.run: Any = self.module
        if name == "freeze":
            self.run = torch.compile(self.module, backend="convaware", options={"tolerance": 0.0})
            cacompile.session(self.module).freeze(*BELOW)
            self._follow = Follow(self.module, schedule)
        elif name != "flip, eager":
            self.run = torch.compile(self.module)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4)
        self.step = 0
        self.setting: list[float] = []
        """Seconds of each round in which what is frozen was set, changed or not."""

    def train(self) -> None:
        self.setting.append(0.0)
        for _ in range(STEPS):
            dropped: list[nn.Module] = []
            begun = time.perf_counter()
            if self.name == "freeze":
                self._follow(self.step % STEPS)
            else:
                frozen = self.schedule.frozen(self.step % STEPS)
                for layer in self.schedule.layers:
                    for name in layer:
                        block = self.module.get_submodule(name)
                        if self.name != "drop gradients":
                            block.requires_grad_(name not in frozen)
                        elif name in frozen:
                            dropped.append(block)
            self.setting[-1] += time.perf_counter() - begun
            logits = self.run(self.tokens[:, :-1])
            F.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten()).backward()
            for block in dropped:
                block.zero_grad()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.step += 1


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=5)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="of 100 later steps")
    parser.add_argument("--out", type=result_file, default=RESULTS / "flipping_cpu.csv")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round")
    args = parser.parse_args(argv)
    if args.smoke:
        args.width, args.depth, args.context, args.batch, args.rounds = 32, 2, 8, 2, 1
    torch.manual_seed(0)
    model = GPT(SYMBOLS, width=args.width, depth=args.depth, heads=max(1, args.width // 64), context=args.context)
    tokens = torch.randint(0, SYMBOLS, (args.batch, args.context + 1))
    layers = [f"blocks.{i}" for i in range(args.depth)]
    schedule = RandomLayers(layers, live_layers=min(2, args.depth - 1), every=EVERY, seed=2)
    sets = [schedule.frozen(step) for step in range(STEPS)]
    changes = sum(a != b for a, b in pairwise(sets))
    case = f"GPT width {args.width} depth {args.depth}, {args.batch * args.context} tokens"
    print(f"{case}: {len(set(sets))} sets of frozen blocks, {changes} changes in {STEPS} steps")

    rows: list[Row] = []
    arms: dict[str, Arm] = {}
    compiles: dict[str, int] = {}
    first: dict[str, float] = {}
    later: dict[str, list[float]] = {}
    with torch._inductor.config.patch(force_disable_caches=True):
        for name in ("freeze", "flip, compiled", "drop gradients", "flip, eager"):
            torch._dynamo.reset()  # its limit of compilations is of the code, which all arms share
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            arms[name] = Arm(name, model, schedule, tokens)
            first[name] = wall_clock(arms[name].train)
            later[name] = [wall_clock(arms[name].train) for _ in range(args.rounds)]
            compiles[name] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
    weights = {name: torch.nn.utils.parameters_to_vector(arm.module.parameters()) for name, arm in arms.items()}
    table = []
    for name in arms:
        apart = float((weights[name] - weights["flip, eager"]).abs().max())
        spread = Spread.of(later[name])
        setting = Spread.of([1e3 * seconds for seconds in arms[name].setting[1:]])
        rows += [
            (case, name, "first 100 steps", "s", Spread.of([first[name]])),
            (case, name, "later 100 steps", "s", spread),
            (case, name, "setting what is frozen in later 100 steps", "ms", setting),
            (case, name, "graphs traced by Dynamo", "count", Spread.of([float(compiles[name])])),
            (case, name, "largest distance of a weight from eager", "", Spread.of([apart])),
        ]
        table.append((name, f"{first[name]:.1f}", str(spread), str(setting), compiles[name], f"{apart:.1g}"))
    heads = ["arm", "first 100 steps, s", "later 100 steps, s", "of it setting, ms", "graphs traced", "apart"]
    print(tabulate(table, headers=heads, disable_numparse=True))
    print(f"later: median [quartiles] of {args.rounds} rounds, one arm after the other")
    write_rows(args.out, "flipping", rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
