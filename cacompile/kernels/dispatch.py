"""Which way a product takes when some of its blocks are off and the host may look: as measured on this device.

slices: one library product for each live run, straight into its slice. packed: live rows and columns put side by side,
one library product, spread again. tiles: the Triton kernel. `python -m benchmarks.kernels.tune` writes measured.csv, in
which every row says what was measured for one shape:

    device, capability     "cpu", or a GPU's name and its compute capability
    op, dtype, m, n, k     mm, bmm or conv, as one matrix product [m, k] x [k, n]: a conv has m filters, n = channels
                           times kernel, k output pixels; of a bmm, one batch entry's
    long_run               mean length of a live run, in rows, from which slices beat packed; inf: never
    tiles_below            share of live entries below which tiles beat the better of these; 1: always, 0: never
    rounds                 of interleaved measurements, of which medians were compared
    date, torch, triton    when, and with what
"""

import csv
import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import KERNEL_DTYPES, all_on, length, live_runs, multiply_runs
from .decide import Way, decide

log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """What was measured for a shape; the module's text says what it means."""

    long_run: float
    tiles_below: float


DEFAULT = Choice(256, 0.0)
"""Where nothing was measured: the library, which cannot surprise, by the rule that suits most CPUs."""


class Row(NamedTuple):
    """The part of a line of measured.csv that a choice depends on."""

    device: str
    capability: str
    op: str
    itemsize: int
    sizes: tuple[int, int, int]
    choice: Choice


@cache
def table() -> tuple[Row, ...]:
    """measured.csv."""
    lines = (files(__package__) / "measured.csv").read_text().splitlines()
    return tuple(
        Row(
            line["device"],
            line["capability"],
            line["op"],
            getattr(torch, line["dtype"]).itemsize,
            (int(line["m"]), int(line["n"]), int(line["k"])),
            Choice(float(line["long_run"]), float(line["tiles_below"])),
        )
        for line in csv.DictReader(lines)
    )


@lru_cache(maxsize=4096)
def choose(device: torch.device, op: str, dtype: torch.dtype, m: int, n: int, k: int) -> Choice:
    """What was measured for the nearest shape: on this device, or else on one of its family. One microsecond.

    float16 is taken for bfloat16. Everything about CPUs is in rows named "cpu", whichever they are.
    """
    name, capability = describe(device)
    rows = [row for row in table() if (row.op, row.itemsize) == (op, dtype.itemsize)]
    family = capability.split(".")[0]
    for near in (
        [row for row in rows if row.device == name],
        [row for row in rows if capability and row.capability.split(".")[0] == family],
    ):
        if near:
            return min(near, key=lambda row: _distance(row.sizes, (m, n, k))).choice
    if capability:
        _report_unmeasured(name)
    return DEFAULT


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    return sum(math.log(max(i, 1) / max(j, 1)) ** 2 for i, j in zip(a, b, strict=True))


@cache
def describe(device: torch.device) -> tuple[str, str]:
    """A device's name and compute capability, as in the table; ("cpu", "") for CPUs."""
    if device.type != "cuda":
        return device.type, ""
    return torch.cuda.get_device_name(device), ".".join(map(str, torch.cuda.get_device_capability(device)))


@cache
def _report_unmeasured(name: str) -> None:
    log.info("masked products were never measured on %s; python -m benchmarks.kernels.tune does that in minutes", name)


def by_library(
    product: Callable[..., Tensor],
    a: Tensor,
    b: Tensor,
    host: Tensor,
    first_flags: Sequence[int],
    blocks: Sequence[int],
) -> Tensor | None:
    """A masked `product` (torch.mm or torch.bmm) by the library, as the flags on the host ask; None: better by tiles.

    All on, it is the library's own product, bit for bit.
    """
    sizes = (*a.shape[:-1], b.shape[-1])
    if all_on(host, first_flags, blocks, sizes):  # Way.WHOLE
        return product(a, b)
    runs = [
        live_runs(host, first_flag, block, size)
        for first_flag, block, size in zip(first_flags, blocks, sizes, strict=True)
    ]
    live = math.prod(map(length, runs)) / math.prod(sizes) if all(runs) and 0 not in sizes else 0.0
    choice = choose(a.device, "mm" if len(sizes) == 2 else "bmm", a.dtype, sizes[-2], sizes[-1], a.shape[-1])
    way = decide(live, has_tiles=a.dtype in KERNEL_DTYPES, sliceable=True, tiles_below=choice.tiles_below)
    if way is Way.NOTHING:
        return a.new_zeros(sizes)
    return None if way is Way.TILES else multiply_runs(product, a, b, runs, choice.long_run)
