"""Cold and warm start against plain Inductor, and what the first switch to the masked backward costs.

    python -m benchmarks.speed.startup                      # GPT of width 512 on this machine
    python -m benchmarks.speed.startup --smoke --out /tmp/x # checks that the benchmark itself works

Every start is a process of its own. Cold: an empty cache directory; warm: the same directory once more. Within a round
the two backends run in random order. The switch is timed inside the same process: the first backward after a mask with
zeros was pinned, which compiles the masked version, over the first dense backward of Inductor in the same round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tabulate import tabulate

import cacompile
from benchmarks.lib.rows import RESULTS, ROOT, Row, write_rows
from benchmarks.lib.timing import Spread, ratios
from examples.models import GPT

SYMBOLS = 84
MEASURES = ("first forward", "first backward", "first masked backward")


def start(backend: str, width: int, depth: int) -> dict[str, float]:
    """Seconds of the first passes of a fresh process; runs in the child."""
    torch.manual_seed(0)
    model = torch.compile(GPT(SYMBOLS, width=width, depth=depth, heads=4, context=64), backend=backend)
    batch = torch.randint(0, SYMBOLS, (4, 65))
    took = {}

    def passes(first: str, second: str) -> None:
        begin = time.perf_counter()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        middle = time.perf_counter()
        loss.backward()
        took[first], took[second] = middle - begin, time.perf_counter() - middle

    passes("first forward", "first backward")
    if backend == "convaware":
        cacompile.session(model).pin(keep=0.5)
        passes("second forward", "first masked backward")
    return took


def child(backend: str, cache: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.speed.startup", "--start", backend]
    command += ["--width", str(args.width), "--depth", str(args.depth)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    result = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "startup_cpu.csv")
    parser.add_argument("--smoke", action="store_true", help="tiny model, one round")
    parser.add_argument("--start", choices=("inductor", "convaware"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.start:
        print(json.dumps(start(args.start, args.width, args.depth)))
        return []
    if args.smoke:
        args.width, args.depth, args.rounds = 64, 1, 1

    order, shuffle = ["inductor", "convaware"], random.Random(0)
    found: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(args.rounds):
        shuffle.shuffle(order)
        for backend in order:
            with tempfile.TemporaryDirectory() as cache:
                for kind in ("cold", "warm"):
                    for measure, seconds in child(backend, cache, args).items():
                        found.setdefault((kind, backend, measure), []).append(seconds)

    rows, table = [], []
    for (kind, backend, measure), seconds in found.items():
        if measure not in MEASURES:
            continue
        base = "first backward" if measure == "first masked backward" else measure
        against = ratios(seconds, found[kind, "inductor", base])
        case = f"{kind} start, GPT width {args.width} depth {args.depth}"
        rows.append((case, backend, measure, "s", Spread.of(seconds)))
        rows.append((case, backend, measure, f"ratio to inductor's {base}", against))
        table.append((kind, measure, backend, str(Spread.of(seconds)), f"{against} of its {base}"))
    table.sort(key=lambda row: (row[0], MEASURES.index(row[1])))
    print(tabulate(table, headers=["start", "measured", "backend", "seconds", "over Inductor's"]))
    print(f"median [quartiles] of {args.rounds} rounds, every start a process of its own")
    write_rows(args.out, "startup", rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
