"""What stays alive of graphs once they are compiled: Python's bytes and objects, against plain Inductor.

    python -m benchmarks.speed.alive                    # this checkout
    python -m benchmarks.speed.alive --against PATH     # and the checkout with that root: before and after
    python -m benchmarks.speed.alive --smoke --out /tmp/x # checks that the benchmark itself works

Residual MLP blocks, a process for each count. Cold: with an empty cache directory; warm: with the same directory once
more. Counted after the first forward and backward, and again after the first masked backward: by tracemalloc, what
Python's allocator gave out since just before, without tensors' storages; objects that the garbage collector sees; of
these nodes of graphs (each an operation), graphs, and fake tensors. Counts hardly vary, so there are few rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tabulate import tabulate

from benchmarks.lib.rows import RESULTS, ROOT, Row, commit, result_file, write_rows
from benchmarks.lib.timing import Spread

UNITS = {"bytes": "B"}


def count(root: Path, backend: str, cache: str, args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """State -> measure -> count, of a process with the package of one checkout."""
    environment = {**os.environ, "PYTHONPATH": str(root), "TORCHINDUCTOR_CACHE_DIR": cache, "OMP_NUM_THREADS": "1"}
    worker = Path(__file__).with_name("alive_worker.py")
    command = [sys.executable, str(worker), backend, str(args.width), str(args.depth)]
    result = subprocess.run(command, env=environment, cwd=root, check=True, capture_output=True, text=True)
    package, found = json.loads(result.stdout.splitlines()[-1])
    if not Path(package).resolve().is_relative_to(root):
        raise RuntimeError(f"the process for {root} has imported {package}")
    return found


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="root of another checkout")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=result_file, default=RESULTS / "alive_cpu.csv")
    parser.add_argument("--smoke", action="store_true", help="tiny model, one round")
    args = parser.parse_args(argv)
    if args.smoke:
        args.width, args.depth, args.rounds = 32, 2, 1

    arms = [("inductor", ROOT, "inductor"), (f"convaware {commit()}".strip(), ROOT, "convaware")]
    if args.against:
        other = args.against.resolve()
        arms.append((f"convaware before {commit(other)}".strip(), other, "convaware"))
    found: dict[tuple[str, str, str, str], list[int]] = {}
    for _ in range(args.rounds):
        for arm, root, backend in arms:
            with tempfile.TemporaryDirectory() as cache:
                for start in ("cold", "warm"):
                    for state, counts in count(root, backend, cache, args).items():
                        for measure, n in counts.items():
                            found.setdefault((start, state, measure, arm), []).append(n)
    rows, table = [], []
    for (start, state, measure, arm), values in sorted(found.items(), key=lambda item: item[0][:3]):
        spread = Spread.of(values)
        case = f"{start} start, {args.depth} blocks of width {args.width}, {state}"
        rows.append((case, arm, measure, UNITS.get(measure, ""), spread))
        table.append((start, state, measure, arm, str(spread)))
    print(tabulate(table, headers=["start", "state", "alive", "backend", "count"], disable_numparse=True))
    print(f"median [quartiles] of {args.rounds} rounds, every count a process of its own")
    write_rows(args.out, "alive", rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
