"""What the masked Triton kernels share: lists of live tiles, their order, and how few tiles are spread over all units.

A kernel of ours is persistent: about as many programs as the GPU has multiprocessors, each of which works through its
share of the live tiles. Which tiles are live every program finds out for itself from the flags: a running count along
each masked dimension, of which `nth_live` is the inverse. So nothing is launched before, nothing waits for the host.

Tiles that do not fill a last round of all programs are split along the reduction (`split_rest`); the parts are written
apart and added up in a fixed order by a second kernel, so results do not depend on who is first.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

ROWS_AT_ONCE = 16
"""Rows of a split tile that one program adds up."""

FEWEST_STEPS = 4
"""Steps along the reduction below which a tile is not split further."""

FEWEST: tl.constexpr = tl.constexpr(FEWEST_STEPS)


class Tile(NamedTuple):
    """One program's share of the output in rows and columns, its step along the reduction in bytes, and its warps."""

    m: int
    n: int
    k_bytes: int
    warps: int
    stages: int = 3
    per_sm: int = 1
    """Programs that a multiprocessor can hold."""

    def k(self, dtype: torch.dtype) -> int:
        return self.k_bytes // dtype.itemsize

    def meta(self, dtype: torch.dtype) -> dict[str, int]:
        """The keywords of a launch."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k(dtype),
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def architecture(device: torch.device) -> str:
    """The name under which a device's tiles are listed: "sm_80", "sm_90", "sm_100" (and what follows), "amd"."""
    if device.type != "cuda":
        return "sm_80"  # the interpreter, which takes anything
    if torch.version.hip:
        return "amd"
    return "sm_" + str(next(c for c in (100, 90, 80) if _capability(device) >= c or c == 80))


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; few for the interpreter, so that its tests see several rounds."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def input_precision(dtype: torch.dtype, allowed: str) -> str:
    """TF32 only for float32, and only where torch's own setting (`fp32_precision`) allows it."""
    return "tf32" if dtype == torch.float32 and allowed == "tf32" else "ieee"


def span(tile: int, block: int) -> int:
    """How many blocks one tile may touch, rounded up to a power of two; 1: never two; 0: not masked along it."""
    if block == 0:
        return 0
    if block % tile == 0 or tile % block == 0:
        return max(tile // block, 1)
    return triton.next_power_of_2(triton.cdiv(tile - 1, block) + 1)


def list_length(size: int, tile: int, block: int) -> int:
    """Entries, a power of two, of the list of live tiles along a dimension; 0 where it is not masked."""
    return triton.next_power_of_2(triton.cdiv(size, tile)) if block else 0


def live_tiles(host: bytes, tile: int, block: int, size: int) -> int:
    """What `live_count` will find on the device, from a copy of one masked dimension's flags on the host."""
    if block % tile == 0:
        last = triton.cdiv(size - (len(host) - 1) * block, tile)  # of the last block, which may be smaller
        return (len(host) - host.count(0)) * (block // tile) - bool(host[-1]) * (block // tile - last)
    starts = range(0, size, tile)
    return sum(any(host[lo // block : (min(lo + tile, size) - 1) // block + 1]) for lo in starts)


def most_split(tiles: int, programs: int, steps: int) -> tuple[int, int]:
    """Tiles that `split_rest` may split, and parts of each, whatever is live: at most 2 * programs parts."""
    if steps < 2 * FEWEST_STEPS:
        return 0, 0
    most = min(programs - 1, tiles)
    return most, -(-2 * programs // most) if most else 0


def split_k_of(live: int, programs: int, steps: int) -> int:
    """`split_rest` on the host: in how many parts each tile of the last round is split."""
    rest = live % programs
    if rest == 0:
        return 1
    one, two = programs // rest, 2 * programs // rest
    most = max(steps // FEWEST_STEPS, 1)
    return min(two if 20 * one < 9 * two else one, most)


@triton.jit
def live_list(flags, size, BLOCK: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, LIST: tl.constexpr):
    """int32 [LIST]: at i, how many of the tiles 0..i of a dimension touch a block that is on; 0 if it is not masked."""
    if LIST == 0:
        return 0
    else:  # noqa: RET505, the compiler wants both branches
        tile = tl.arange(0, LIST)
        first = tile * TILE // BLOCK
        last = (tl.minimum(tile * TILE + TILE, size) - 1) // BLOCK
        # all at once: a loop here, and triton pipelines it instead of the products
        at = first[:, None] + tl.arange(0, SPAN)[None, :]
        inside = (tile * TILE < size)[:, None] & (at <= last[:, None])
        on = tl.load(flags + at, mask=inside, other=0) != 0
        return tl.cumsum(tl.max(on.to(tl.int32), 1), 0)


@triton.jit
def live_count(seen, size, TILE: tl.constexpr, LIST: tl.constexpr):
    """How many tiles of a dimension are live."""
    if LIST == 0:
        return tl.cdiv(size, TILE)
    else:  # noqa: RET505
        return tl.max(seen, 0)


@triton.jit
def nth_live(seen, n, LIST: tl.constexpr):
    """Index of the n-th live tile, counted from 0."""
    if LIST == 0:
        return n
    else:  # noqa: RET505
        return tl.sum((seen <= n).to(tl.int32), 0)


@triton.jit
def touches_live(flags, tile, size, BLOCK: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr):
    """Whether one tile of a dimension touches a block that is on."""
    if SPAN == 0:
        return tile >= 0
    else:  # noqa: RET505
        last = (tl.minimum(tile * TILE + TILE, size) - 1) // BLOCK
        at = tl.minimum(tile * TILE // BLOCK + tl.arange(0, SPAN), last)
        return tl.max((tl.load(flags + at) != 0).to(tl.int32), 0) != 0


@triton.jit
def entries_on(flags, entries, size, BLOCK: tl.constexpr, SPAN: tl.constexpr):
    """Which of a live tile's rows (or columns) are on: all of them, unless tiles straddle blocks."""
    if SPAN <= 1:
        return entries >= 0
    else:  # noqa: RET505
        return tl.load(flags + entries // BLOCK, mask=entries < size, other=0) != 0


@triton.jit
def grouped(n, rows, columns, GROUP: tl.constexpr):
    """(row, column) of the n-th tile of a grid, GROUP rows at a time: neighbours in time read what is in the L2."""
    first = n // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = n % (GROUP * columns)
    return first + within % height, within // height


@triton.jit
def split_rest(live, programs, steps):
    """(tiles done whole, parts that each of the others is split in): the rest fills one or two rounds.

    Two rounds only where they save a tenth: 68 tiles on 132 programs are one round whole, but two of a third each.
    """
    rest = live % programs
    some = tl.maximum(rest, 1)
    one, two = programs // some, 2 * programs // some
    parts = tl.where(20 * one < 9 * two, two, one)
    parts = tl.where(rest == 0, 1, tl.minimum(parts, tl.maximum(steps // FEWEST, 1)))
    return tl.where(parts == 1, live, live - rest), parts
