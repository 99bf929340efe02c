"""Host time that a training step takes beyond its compiled code: choosing versions, bindings, hooks, the controller.

    python -m benchmarks.speed.host_time                    # this checkout over plain aot_eager
    python -m benchmarks.speed.host_time --against PATH     # and over the checkout with that root
    python -m benchmarks.speed.host_time --smoke --out /tmp/x # checks that the benchmark itself works

A chain of small linear layers, so that Python is what takes the time; inner="aot_eager" on both sides. Arms: `all on`
and `half off`, pinned; `free`, the controller with monitor_every=20. Every checkout has one process, kept alive; a
round is 20 steps of each arm of each checkout, in random order, so that one round has one measurement of the monitor.
Added: what a step takes over aot_eager's in the same round and process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.lib.rows import RESULTS, ROOT, Row, commit, result_file, write_rows
from benchmarks.lib.timing import Spread, ratios

BASE, ARMS = "aot_eager", ("all on", "half off", "free")
STEPS = 20
"""Of a round: as many as from one measurement of the monitor to the next."""

PARTS = ("forward and backward", "optimizer step", "whole step")


class Checkout:
    """The process that trains with the package of one checkout."""

    def __init__(self, root: Path, layers: int, width: int, *, is_other: bool) -> None:
        self.name = f"{'other' if is_other else 'this'} {commit(root)}".strip()
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("host_time_worker.py")), str(layers), str(width)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=root
        )
        self.seconds: dict[str, list[list[float]]] = {arm: [] for arm in (BASE, *ARMS)}
        self.skipped: dict[str, float] = {}
        self.root = root

    def wait(self) -> None:
        """Until all is compiled."""
        package = Path(self._read())
        if not package.resolve().is_relative_to(self.root):
            raise RuntimeError(f"the process for {self.root} has imported {package}")

    def _read(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process for {self.root} has ended with exit code {self.process.wait()}")
        return json.loads(line)

    def turn(self, arm: str, keep: bool) -> None:
        """One round of one arm; keep: whether it counts."""
        self.process.stdin.write(json.dumps([arm, STEPS]) + "\n")
        self.process.stdin.flush()
        passes, optimizer, skipped = self._read()
        if keep:
            self.seconds[arm].append([part / STEPS for part in (passes, optimizer, passes + optimizer)])
            self.skipped[arm] = skipped

    def part(self, arm: str, index: int) -> list[float]:
        """Microseconds a step, of each round."""
        return [1e6 * parts[index] for parts in self.seconds[arm]]

    def added(self, arm: str, index: int) -> list[float]:
        return [ours - base for ours, base in zip(self.part(arm, index), self.part(BASE, index), strict=True)]

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait(10)


def rows_of(case: str, this: Checkout, other: Checkout | None) -> list[Row]:
    """For every arm, checkout and part of a step: its time, what is added to aot_eager's, this over the other's."""
    rows = []
    for arm in ARMS:
        for index, part in enumerate(PARTS):
            for checkout in (this, other) if other else (this,):
                name = f"{arm} ({checkout.name})"
                rows.append((case, name, part, "us", Spread.of(checkout.part(arm, index))))
                rows.append((case, name, f"{part}, added", "us", Spread.of(checkout.added(arm, index))))
            if other:
                name, added = f"{arm} ({this.name})", (this.added(arm, index), other.added(arm, index))
                unit = f"ratio to {other.name}"
                rows.append((case, name, part, unit, ratios(this.part(arm, index), other.part(arm, index))))
                if part == "whole step":  # of a part it may be next to nothing, on which no ratio stands
                    rows.append((case, name, f"{part}, added", unit, ratios(*added)))
                more = Spread.of(ours - theirs for ours, theirs in zip(*added, strict=True))
                rows.append((case, name, f"{part}, added", f"us more than {other.name}", more))
        for checkout in (this, other) if other else (this,):
            skipped = Spread.of([checkout.skipped[arm]])
            rows.append((case, f"{arm} ({checkout.name})", "dW FLOPs skipped in the last round", "share", skipped))
    return rows


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="root of another checkout")
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--out", type=result_file, default=RESULTS / "host_time_cpu.csv")
    parser.add_argument("--smoke", action="store_true", help="few layers, three rounds")
    args = parser.parse_args(argv)
    if args.smoke:
        args.layers, args.rounds = 3, 3

    roots = [ROOT, *([args.against.resolve()] if args.against else [])]
    checkouts = [Checkout(root, args.layers, args.width, is_other=i > 0) for i, root in enumerate(roots)]
    try:
        for checkout in checkouts:
            checkout.wait()
        turns, shuffle = [(checkout, arm) for checkout in checkouts for arm in (BASE, *ARMS)], random.Random(0)
        for number in range(-2, args.rounds):  # two that do not count: until the free arm has been measured
            shuffle.shuffle(turns)
            for checkout, arm in turns:
                checkout.turn(arm, keep=number >= 0)
    finally:
        for checkout in checkouts:
            checkout.stop()
    case = f"{args.layers} linear layers of width {args.width}, batch 4, aot_eager"
    rows = rows_of(case, checkouts[0], checkouts[1] if args.against else None)
    table = [(arm, measure, unit, str(spread)) for _, arm, measure, unit, spread in rows]
    print(tabulate(table, headers=["arm", "measured", "in", "median [quartiles]"]))
    print(f"median [quartiles] of {args.rounds} interleaved rounds of {STEPS} steps; {case}")
    write_rows(args.out, "host_time", rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
