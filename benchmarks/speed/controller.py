"""What the controller itself costs: monitor, policy and turns after each optimizer step, estimates before it.

    python -m benchmarks.speed.controller                      # GPT of width 512 on this machine
    python -m benchmarks.speed.controller --smoke --out /tmp/x # checks that the benchmark itself works

Training with default options. Each call of the two hooks is timed, a period of `monitor_every` steps is one round, and
what a round's hooks took is held against what its steps took without them. Memory: what is kept for each block on the
device and on the host, over the bytes of the parameters.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tabulate import tabulate

import cacompile
from benchmarks.lib.rows import RESULTS, Row, result_file, write_rows
from benchmarks.lib.timing import Spread
from cacompile.controller.controller import Controller
from cacompile.state.table import COLUMNS
from examples.models import GPT

SYMBOLS, CONTEXT = 84, 64


def timed(method: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        found = method(*args, **kwargs)
        spent[0] += time.perf_counter() - begin
        return found

    return call


def kept_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """(on the device, on the host) for all blocks."""
    device = host = 0
    for param in cacompile.session(model).params.values():
        device += sum(place.nbytes for place in param.sampled or ())
        host += sum(param.column(name).nbytes for name in COLUMNS)
    return device, host


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=result_file, default=RESULTS / "controller_cpu.csv")
    parser.add_argument("--smoke", action="store_true", help="tiny model, two rounds")
    args = parser.parse_args(argv)
    if args.smoke:
        args.width, args.depth, args.batch, args.rounds = 64, 1, 4, 2

    torch.manual_seed(0)
    model = GPT(SYMBOLS, width=args.width, depth=args.depth, heads=4, context=CONTEXT)
    compiled = torch.compile(model, backend="convaware")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    text = torch.randint(SYMBOLS, (args.batch, CONTEXT + 1))

    def step() -> None:
        F.cross_entropy(compiled(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    every = cacompile.session(model).config.monitor_every
    for _ in range(2 * every - 1):  # until something is skipped, which compiles once more
        step()
    spent: dict[str, list[float]] = {"estimates": [0.0], "monitor, policy and turns": [0.0]}
    plain = Controller.fill, Controller.advance
    Controller.fill, Controller.advance = (
        timed(method, held) for method, held in zip(plain, spent.values(), strict=True)
    )
    shares: dict[str, list[float]] = {name: [] for name in spent}
    try:
        for _ in range(args.rounds):
            for held in spent.values():
                held[0] = 0.0
            begin = time.perf_counter()
            for _ in range(every):
                step()
            rest = time.perf_counter() - begin - sum(held[0] for held in spent.values())
            for name, held in spent.items():
                shares[name].append(100.0 * held[0] / rest)
    finally:
        Controller.fill, Controller.advance = plain

    case = f"GPT width {args.width} depth {args.depth}, {args.batch * CONTEXT} tokens"
    rows = [(case, name, "host time over that of the steps", "%", Spread.of(values)) for name, values in shares.items()]
    size = sum(param.nbytes for param in model.parameters())
    for name, kept in zip(("on the device", "on the host"), kept_bytes(model), strict=True):
        rows.append((case, name, "memory over the parameters'", "%", Spread.of([100.0 * kept / size])))
    print(tabulate([(arm, measure, f"{spread} %") for _, arm, measure, _, spread in rows], ["", "of", "share"]))
    status = cacompile.status(model)
    skipped = f"{status.saved_flops / status.dw_flops:.0%} of dW skipped"
    print(f"{case}; median [quartiles] of {args.rounds} rounds of {every} steps; {skipped}")
    write_rows(args.out, "controller", rows)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
