"""Cold and warm start against plain Inductor, and what the first switch to the masked backward costs.

    python -m benchmarks.speed.startup                      # GPT of width 512 on this machine
    python -m benchmarks.speed.startup --smoke --out /tmp/x # checks that the benchmark itself works

Every start is a process of its own. Cold: an empty cache directory; warm: the same directory once more; carried: an
empty one, and the artifacts of the cold process (`torch.compiler.save_cache_artifacts`). Within a round the backends
run in random order. Start: `torch.compile`, where Inductor is imported for itself, and the first forward and backward,
for it compiles a backward when that first runs, and our graphs have theirs compiled with the forward. Switch: what the
first backward after pinning half of the groups takes longer than a masked one; "convaware aside" is the option
switch="when compiled". A run that was interrupted goes on after its last round, kept beside the rows until then, if
commit and arguments are the same. Beside the seconds: hits in AOTAutograd's cache, misses in Inductor's, and nodes of
graphs that are alive in the end (each an operation).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch._dynamo.utils import counters

import cacompile
from benchmarks.lib.rows import RESULTS, ROOT, Row, commit, result_file, write_rows
from benchmarks.lib.timing import Spread, ratios
from examples.models import GPT

SYMBOLS = 84
MEASURES = ("first forward", "first backward", "start", "switch")
COUNTS = ("hits", "misses", "nodes alive")
KINDS = ("cold", "warm", "carried")


def start(backend: str, width: int, depth: int, artifacts: Path, kind: str) -> dict[str, float]:
    """Seconds of the first passes of a fresh process, and counts; runs in the child."""
    torch.manual_seed(0)
    if kind == "carried":
        torch.compiler.load_cache_artifacts(artifacts.read_bytes())
    begun = time.perf_counter()
    backend, _, aside = backend.partition(" ")
    options = {"switch": "when compiled"} if aside else None
    model = torch.compile(GPT(SYMBOLS, width=width, depth=depth, heads=4, context=64), backend=backend, options=options)
    batch = torch.randint(0, SYMBOLS, (4, 65))
    took = {"torch.compile": time.perf_counter() - begun}

    def passes(first: str, second: str) -> None:
        begin = time.perf_counter()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        middle = time.perf_counter()
        loss.backward()
        took[first], took[second] = middle - begin, time.perf_counter() - middle

    passes("first forward", "first backward")
    took["start"] = took["torch.compile"] + took["first forward"] + took["first backward"]
    if backend == "convaware":
        cacompile.session(model).pin(keep=0.5)
        passes("second forward", "first masked backward")
        longest = took["first masked backward"]
        while any(thread.name == "convaware compile" for thread in threading.enumerate()):
            passes("second forward", "another backward")
            longest = max(longest, took["another backward"])
        passes("third forward", "second masked backward")
        took["switch"] = longest - took["second masked backward"]
    if kind == "cold" and (found := torch.compiler.save_cache_artifacts()) is not None:
        artifacts.write_bytes(found[0])
    gc.collect()
    took["hits"] = counters["aot_autograd"]["autograd_cache_hit"]
    took["misses"] = counters["inductor"]["fxgraph_cache_miss"]
    took["nodes alive"] = sum(type(each) is torch.fx.Node for each in gc.get_objects())
    return took


def child(backend: str, cache: str, artifacts: str, kind: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.speed.startup", "--start", backend, kind, artifacts]
    command += ["--width", str(args.width), "--depth", str(args.depth)]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    result = subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def same(args: argparse.Namespace) -> list[Any]:
    """What a round that was done before must agree in."""
    return [args.width, args.depth, torch.__version__, commit()]


def done_before(unfinished: Path, args: argparse.Namespace) -> list[list[tuple[str, str, str, float]]]:
    """The rounds of a run that was interrupted, of this commit and with the same arguments."""
    lines = unfinished.read_text().splitlines() if unfinished.exists() else []
    rounds = [results for of, results in map(json.loads, lines) if of == same(args)]
    if rounds:
        print(f"going on after {len(rounds)} rounds of {unfinished}", flush=True)
    return rounds


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=result_file, default=RESULTS / "startup_cpu.csv")
    parser.add_argument("--smoke", action="store_true", help="tiny model, one round")
    parser.add_argument("--start", nargs=3, metavar=("BACKEND", "KIND", "ARTIFACTS"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.start:
        backend, kind, artifacts = args.start
        print(json.dumps(start(backend, args.width, args.depth, Path(artifacts), kind)))
        return []
    if args.smoke:
        args.width, args.depth, args.rounds = 64, 1, 1

    order, shuffle = ["inductor", "convaware", "convaware aside"], random.Random(0)
    unfinished = args.out.with_suffix(".unfinished.jsonl")
    rounds = done_before(unfinished, args)
    for number in range(args.rounds):
        shuffle.shuffle(order)
        if number < len(rounds):
            continue
        begun, results = time.perf_counter(), []
        for backend in order:
            with tempfile.TemporaryDirectory() as folder:
                for kind in KINDS:
                    cache = f"{folder}/{'carried' if kind == 'carried' else 'own'}"
                    took = child(backend, cache, f"{folder}/artifacts", kind, args)
                    results += [(kind, backend, measure, value) for measure, value in took.items()]
        rounds.append(results)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "a") as file:
            file.write(json.dumps([same(args), results]) + "\n")
        print(f"round {number + 1} of {args.rounds}: {time.perf_counter() - begun:.0f} s", flush=True)
    found: dict[tuple[str, str, str], list[float]] = {}
    for kind, backend, measure, value in (each for results in rounds[: args.rounds] for each in results):
        found.setdefault((kind, backend, measure), []).append(value)

    rows, table = [], []
    for (kind, backend, measure), values in found.items():
        if measure not in MEASURES + COUNTS:
            continue
        case = f"{kind} start, GPT width {args.width} depth {args.depth}"
        rows.append((case, backend, measure, "s" if measure in MEASURES else "", Spread.of(values)))
        against = ""
        if measure in MEASURES and measure != "switch":
            ratio = ratios(values, found[kind, "inductor", measure])
            rows.append((case, backend, measure, f"ratio to inductor's {measure}", ratio))
            against = str(ratio)
        table.append((kind, measure, backend, str(Spread.of(values)), against))
    table.sort(key=lambda row: (KINDS.index(row[0]), (MEASURES + COUNTS).index(row[1]), row[2]))
    print(tabulate(table, headers=["start", "measured", "backend", "seconds or count", "over Inductor's"]))
    print(f"median [quartiles] of {args.rounds} rounds, every start a process of its own")
    write_rows(args.out, "startup", rows)
    unfinished.unlink(missing_ok=True)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
