"""Host time that a masked operation adds to the library call it stands in for: all on, and half on.

    python -m benchmarks.speed.overhead                          # on this machine's CPU
    python -m benchmarks.speed.overhead --device cuda            # launches alone are timed, not the work
    python -m benchmarks.speed.overhead --self-check --out /tmp/x

Operands are tiny, so that calling is what takes the time; the goal is 10 us. Rounds are interleaved: in each, every arm
makes so many calls in a row, and differences are taken round by round.
"""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable

import torch

from benchmarks.lib.rows import RESULTS, Row, result_file, write_rows
from benchmarks.lib.tables import text_table
from benchmarks.lib.timing import Spread, interleave, wall_clock
from cacompile.kernels import masked_bmm, masked_conv_dw, masked_mm

GOAL = 10.0
"""Microseconds a call."""

Call = Callable[[], object]


def pairs(device: torch.device) -> dict[str, tuple[Call, Call]]:
    """Case -> (the library's call, ours), as a compiled graph would make them."""
    flags = torch.ones(8, dtype=torch.uint8, device=device)
    half = torch.tensor([1, 0] * 4, dtype=torch.uint8, device=device)
    on_gpu = device.type != "cpu"
    host, half_host = (flags.cpu(), half.cpu()) if on_gpu else (None, None)
    a, b = torch.randn(4, 4, device=device), torch.randn(2, 4, 4, device=device)
    grad_out, x, weight = (torch.randn(2, 2, 3, 3, device=device) for _ in range(3))
    conv = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
    library = torch.ops.aten.convolution_backward.default
    found = {
        "masked_mm, all on": (
            lambda: torch.mm(a, a),
            lambda: masked_mm(a, a, flags, host, [0, 0], [2, 0]),
        ),
        "masked_mm, half on": (
            lambda: torch.mm(a, a),
            lambda: masked_mm(a, a, half, half_host, [0, 0], [2, 0]),
        ),
        "masked_bmm, all on": (
            lambda: torch.bmm(b, b),
            lambda: masked_bmm(b, b, flags, host, [0, 0, 0], [0, 2, 0]),
        ),
        "masked_conv_dw, all on": (
            lambda: library(grad_out, x, weight, None, *conv, [False, True, False])[1],
            lambda: masked_conv_dw(grad_out, x, weight, flags, host, 0, 1, 0, *conv),
        ),
    }
    if on_gpu:
        found["masked_mm, flags on the device alone"] = (
            lambda: torch.mm(a, a),
            lambda: masked_mm(a, a, half, None, [0, 0], [2, 0]),
        )
    return found


def repeated(call: Call, calls: int, device: torch.device) -> Call:
    def run() -> None:
        for _ in range(calls):
            call()

    def timed() -> float:
        seconds = wall_clock(run)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return seconds

    return timed


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=1001)
    parser.add_argument("--calls", type=int, default=20, help="in a row, each round: too short to be interrupted")
    parser.add_argument("--out", type=result_file)
    parser.add_argument("--self-check", action="store_true", help="a few calls: does the benchmark itself work?")
    args = parser.parse_args(argv)
    if args.self_check:
        args.rounds, args.calls = 3, 5
    device = torch.device(args.device)
    torch.set_num_threads(1)

    rows, table = [], []
    for op, (library, ours) in pairs(device).items():
        arms = {"library": repeated(library, args.calls, device), "masked": repeated(ours, args.calls, device)}
        interleave(arms, 2)
        seconds = interleave(arms, args.rounds, clock=lambda arm: arm())  # type: ignore[arg-type, return-value]
        each = {name: [second / args.calls * 1e6 for second in arm] for name, arm in seconds.items()}
        added = Spread.of(mine - its for mine, its in zip(each["masked"], each["library"], strict=True))
        for name, spread in ((name, Spread.of(values)) for name, values in each.items()):
            rows.append((f"{op}, tiny operands", name, "host time a call", "us", spread))
        rows.append((f"{op}, tiny operands", "masked", "host time a call over the library's", "us", added))
        verdict = "meets" if added.median <= GOAL else "misses"
        table.append((op, *(str(Spread.of(values)) for values in each.values()), str(added), verdict))
    heads = ["operation", "library, us", "masked, us", "added, us", f"goal {GOAL:g} us"]
    print(text_table(heads, table))
    print(f"median [quartiles] of {args.rounds} interleaved rounds of {args.calls} calls on {device}")
    name = platform.machine() + " CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    write_rows(args.out or RESULTS / f"overhead_{device.type}.csv", "overhead", rows, name)
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
