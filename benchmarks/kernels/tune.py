"""Measure which way masked products should take on this machine, and write it to cacompile/kernels/measured.csv.

    python -m benchmarks.kernels.tune                        # the GPU if there is one, else the CPU; three minutes
    python -m benchmarks.kernels.tune --device cpu --minutes 5
    python -m benchmarks.kernels.tune --self-check           # tiny, seconds, writes to a temporary file

The file's columns are explained in cacompile/kernels/dispatch.py; rows of other devices stay as they are. For each
shape two questions are asked, in interleaved rounds, until the time is over:

  - every second block on, in blocks of L rows: from which L on is a product for each run ("slices") faster than one
    product of all runs put side by side ("packed")?  -> long_run
  - on a GPU, blocks of 128 rows drawn at random: below which share of live blocks is the Triton kernel ("tiles") faster
    than the better of those?  -> tiles_below

Operands rotate through more memory than caches hold. What was measured is printed: medians of ratios, round by round.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lib.rows import ROOT, result_file
from benchmarks.lib.tables import text_table
from benchmarks.lib.timing import gpu_clock, interleave, ratios, wall_clock
from cacompile.kernels.blocks import Run, live_runs, multiply_runs
from cacompile.kernels.dispatch import describe
from cacompile.kernels.masked_conv import convolve_runs, convolve_tiles

FILE = ROOT / "cacompile" / "kernels" / "measured.csv"
COLUMNS = ("device", "capability", "op", "dtype", "m", "n", "k", "long_run", "tiles_below", "rounds", "date", "torch",
           "triton")  # fmt: skip
LENGTHS = (32, 64, 128, 256, 512, 1024)
SHARES = (0.125, 0.25, 0.5, 0.75, 0.875)
BLOCK = 128
CACHES = {"cpu": 64 << 20, "cuda": 256 << 20}
"""Bytes that operands rotate through, in 2 to 16 sets."""
EXPERTS = 4

Sizes = tuple[int, int, int]
SHAPES: dict[str, dict[str, tuple[Sizes, ...]]] = {  # device -> op -> (m, n, k)
    "cpu": {
        "mm": ((512, 512, 1024), (1024, 1024, 1024), (2048, 512, 512), (2048, 2048, 512)),
        "bmm": ((512, 512, 512), (2048, 512, 512)),
        "conv": ((64, 64 * 9, 8 * 14 * 14), (256, 256 * 9, 8 * 7 * 7), (512, 128, 8 * 14 * 14)),
    },
    "cuda": {
        "mm": ((1024, 1024, 8192), (4096, 1024, 8192), (4096, 4096, 8192), (2048, 8192, 16384)),
        "bmm": ((2048, 1024, 2048),),
        "conv": ((256, 256 * 9, 64 * 14 * 14), (512, 512 * 9, 64 * 7 * 7), (1024, 256, 64 * 14 * 14)),
    },
    "self-check": {
        "mm": ((128, 32, 32),),
        "bmm": ((128, 16, 16),),
        "conv": ((128, 8 * 9, 2 * 3 * 3), (128, 8, 2 * 3 * 3)),
    },
}


@dataclass
class Case:
    """One shape of one operation, and the seconds of each arm so far."""

    op: str
    dtype: torch.dtype
    sizes: Sizes
    device: torch.device
    seconds: dict[tuple[str, str, float], list[float]] = field(default_factory=dict)
    """By (question, way, length or share)."""

    def __post_init__(self) -> None:
        bytes_each = self.dtype.itemsize * sum(t.numel() for t in self._operands())
        sets = max(2, min(16, CACHES[self.device.type] // bytes_each))
        self._turn = itertools.cycle([self._operands() for _ in range(sets)])

    def _operands(self) -> tuple[Tensor, ...]:
        m, n, k = self.sizes

        def randn(*shape: int) -> Tensor:
            return torch.randn(shape, device=self.device).to(self.dtype)

        if self.op == "mm":
            return randn(k, m).t(), randn(k, n)
        if self.op == "bmm":
            return randn(EXPERTS, k, m).mT, randn(EXPERTS, k, n)
        kernel = 3 if n % 9 == 0 else 1
        side = max(s for s in (56, 28, 14, 7, 3) if k % (s * s) == 0)
        images = [randn(k // (side * side), c, side, side) for c in (m, n // kernel**2)]
        return *(i.to(memory_format=torch.channels_last) for i in images), randn(m, n // kernel**2, kernel, kernel)

    def _call(self, way: str, flags: Tensor, block: int) -> Callable[[], Tensor]:
        m = self.sizes[0]
        runs = live_runs(flags, 0, block, m)
        on_device = flags.to(self.device)
        long_run = {"slices": 0.0, "packed": math.inf}.get(way)

        def convolve() -> Tensor:
            images = next(self._turn)
            n = images[0].dim() - 2
            conv = [1] * n, [images[2].shape[-1] // 2] * n, [1] * n, False, [0] * n, 1
            if long_run is None:
                return convolve_tiles(*images, on_device, 0, block, 0, *conv)
            return convolve_runs(*images, runs, long_run, 0, *conv)

        def multiply() -> Tensor:
            a, b = next(self._turn)
            if long_run is None:
                from cacompile.kernels.triton_matmul import masked_matmul

                a, b = (a, b) if a.dim() == 3 else (a[None], b[None])
                return masked_matmul(a, b, on_device, (0, 0, 0), (0, block, 0))
            whole: list[list[Run]] = [[(0, EXPERTS)]] if self.op == "bmm" else []
            product = torch.bmm if self.op == "bmm" else torch.mm
            return multiply_runs(product, a, b, [*whole, runs, [(0, b.shape[-1])]], long_run)

        return convolve if self.op == "conv" else multiply

    def arms(self) -> dict[tuple[str, str, float], Callable[[], Tensor]]:
        m = self.sizes[0]
        found = {}
        for length in (length for length in LENGTHS if 4 * length <= m):
            flags = (torch.arange(m // length) % 2 == 0).to(torch.uint8)
            for way in ("slices", "packed"):
                found["length", way, float(length)] = self._call(way, flags, length)
        if self.device.type == "cuda":
            block = min(BLOCK, m // 8)
            for share in SHARES:
                live = max(1, round(share * (m // block)))
                flags = torch.zeros(m // block, dtype=torch.uint8)
                flags[random.Random(0).sample(range(m // block), live)] = 1
                for way in ("slices", "packed", "tiles"):
                    found["share", way, live / len(flags)] = self._call(way, flags, block)
        return found

    def ratios(self) -> Iterator[tuple[str, float, float]]:
        """(question, length or share, median of the ratio of what is asked for to what it must beat)."""
        for question, way, x in self.seconds:
            if (question, way) == ("length", "slices"):
                yield question, x, ratios(self.seconds[question, way, x], self.seconds[question, "packed", x]).median
            if (question, way) == ("share", "tiles"):
                ways = (self.seconds[question, way, x] for way in ("slices", "packed"))
                yield question, x, max(ratios(self.seconds[question, way, x], other).median for other in ways)

    def choice(self) -> tuple[float, float]:
        """(long_run, tiles_below), as the table has them."""
        return long_run_of(self._measured("length")), tiles_below_of(self._measured("share"))

    def _measured(self, question: str) -> dict[float, float]:
        return {x: ratio for asked, x, ratio in self.ratios() if asked == question}


def long_run_of(ratio_at: dict[float, float]) -> float:
    """The length from which on slices win most, all lengths from there on together; inf: they never do."""
    lengths = sorted(ratio_at, reverse=True)
    return (math.inf, *lengths)[_most_won([ratio_at[length] for length in lengths])]


def tiles_below_of(ratio_at: dict[float, float]) -> float:
    """Halfway between the last share up to which tiles win most and the next; 1 if that is the last, 0 if never."""
    shares = sorted(ratio_at)
    won = _most_won([ratio_at[share] for share in shares])
    if won == len(shares):
        return 1.0 if shares else 0.0
    return (shares[won - 1] + shares[won]) / 2 if won else 0.0


def _most_won(ratios: list[float]) -> int:
    """How many of the first ratios have the smallest product: one noisy measurement does not decide alone."""
    products = [0.0, *itertools.accumulate(map(math.log, ratios))]
    return products.index(min(products))


def measure(cases: list[Case], seconds: float, least: int, most: int) -> int:
    """Rounds over all cases, each as often as the others, until the time is over; returns how many."""
    clock = gpu_clock if cases[0].device.type == "cuda" else wall_clock
    arms = [case.arms() for case in cases]
    deadline = time.monotonic() + seconds
    for case_arms in arms:
        interleave(case_arms, 1, clock=clock)  # compiles, and fills caches of plans
    done = 0
    while done < least or (done < most and time.monotonic() < deadline):
        for case, case_arms in zip(cases, arms, strict=True):
            for arm, took in interleave(case_arms, 1, seed=done, clock=clock).items():  # type: ignore[type-var]
                case.seconds.setdefault(arm, []).extend(took)
        done += 1
    return done


def write(file: Path, device: torch.device, cases: list[Case], rounds: int) -> None:
    """Replace the rows of this device, keep the others."""
    name, capability = describe(device)
    kept = []
    if file.exists():
        with open(file, newline="") as old:
            kept = [row for row in csv.DictReader(old) if row["device"] != name]
    try:
        triton = version("triton") if device.type == "cuda" else ""
    except PackageNotFoundError:
        triton = ""
    with open(file, "w", newline="") as out:
        lines = csv.DictWriter(out, COLUMNS, lineterminator="\n", restval="")
        lines.writeheader()
        lines.writerows(kept)
        for case in (case for case in cases if case.seconds):  # some are too small to have been measured
            long_run, tiles_below = case.choice()
            values = (name, capability, case.op, str(case.dtype).removeprefix("torch."), *case.sizes, f"{long_run:g}",
                      f"{tiles_below:g}", rounds, datetime.date.today().isoformat(), torch.__version__,
                      triton)  # fmt: skip
            lines.writerow(dict(zip(COLUMNS, values, strict=True)))


def report(cases: list[Case], rounds: int) -> str:
    questions = {"length": "slices / packed, blocks of L rows", "share": "tiles / better library way, share live"}
    table = []
    for case in cases:
        measured: dict[str, list[str]] = {}
        for question, x, ratio in case.ratios():
            measured.setdefault(question, []).append(f"{x:g}: {ratio:.2f}")
        shape = " x ".join(map(str, case.sizes))
        chosen = dict(zip(questions, case.choice(), strict=True))
        for question, entries in measured.items():
            table.append(
                (case.op, str(case.dtype)[6:], shape, questions[question], "  ".join(entries), chosen[question])
            )
    headers = ["op", "dtype", "m x n x k", "ratio", "measured", "long_run or tiles_below"]
    printed = text_table(headers, table)
    return f"{printed}\nmedians of {rounds} interleaved rounds, {torch.get_num_threads()} threads"


def main(argv: list[str] | None = None) -> list[Case]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=3.0, help="about how long to measure")
    parser.add_argument("--out", type=result_file, help="instead of the package's own table")
    parser.add_argument("--self-check", action="store_true", help="tiny shapes, two rounds: does it work?")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    shapes = SHAPES["self-check" if args.self_check else device.type]
    cases = [
        Case(op, dtype, sizes, device)
        for op, all_sizes in shapes.items()
        for sizes in all_sizes
        for dtype in (torch.float32, torch.bfloat16)
    ]
    rounds = measure(cases, args.minutes * 60, least=2, most=2 if args.self_check else 200)
    print(report(cases, rounds))
    file = args.out or FILE
    if args.self_check and args.out is None:
        file = Path(tempfile.mkdtemp()) / FILE.name
    write(file, device, cases, rounds)
    print(f"written to {file}")
    return cases


if __name__ == "__main__":
    main(sys.argv[1:])
