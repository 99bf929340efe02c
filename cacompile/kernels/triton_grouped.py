"""The Triton side of masked_grouped_mm: each program takes one tile of one expert's weight gradient.

Unlike the persistent kernel of products: experts have different numbers of tokens, so tiles of one launch cost
differently, and the GPU's own scheduler, which starts the next program wherever one ends, evens that out. A program
whose tile is off only writes zeros.

Needs triton, which torch for CPUs comes without: imported at the first call with CUDA tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_tiles import Tile, architecture, entries_on, grouped, input_precision, span, touches_live

CONFIGS: dict[str, dict[str, Tile]] = {
    "sm_80": {
        "large": Tile(128, 128, 64, 8, 4),
        "small": Tile(64, 64, 128, 4, 3, 2),
        "unaligned": Tile(64, 64, 64, 4, 3, 2),
        "tf32": Tile(128, 128, 64, 8, 3),
        "float32": Tile(64, 64, 64, 8, 2),
    },
    "sm_90": {
        "large": Tile(128, 128, 128, 8, 3, 2),
        "small": Tile(64, 64, 128, 4, 4, 2),
        "unaligned": Tile(64, 64, 64, 4, 3, 2),
        "tf32": Tile(128, 128, 128, 8, 3),
        "float32": Tile(64, 64, 64, 8, 2),
    },
    "sm_100": {
        "large": Tile(128, 128, 128, 8, 3, 2),
        "small": Tile(64, 64, 128, 4, 4, 2),
        "unaligned": Tile(64, 64, 64, 4, 3, 2),
        "tf32": Tile(128, 128, 128, 8, 3),
        "float32": Tile(64, 64, 64, 8, 3),
    },
    "amd": {
        "large": Tile(128, 128, 64, 8, 2, 2),
        "small": Tile(64, 64, 128, 4, 2, 2),
        "unaligned": Tile(64, 64, 64, 4, 2, 2),
        "tf32": Tile(128, 128, 128, 4, 2),
        "float32": Tile(64, 64, 64, 4, 2, 2),
    },
}
"""Architecture -> shape -> tile; by the compilers of triton 3.6, 3.7.1 and 3.8 none of them spills.

Rather two of these on a multiprocessor than one twice as wide: experts' sums are short, so that while one program
fills its pipeline or writes its tile another should multiply.
"""


@triton.jit(do_not_specialize=["S", "e_first_flag", "m_first_flag", "n_first_flag"])
def masked_grouped_kernel(
    a, b, out, offs, flags, M, N, S, e_first_flag, m_first_flag, n_first_flag,
    stride_am, stride_ak, stride_bk, stride_bn,
    E_BLOCK: tl.constexpr, M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr,
    M_SPAN: tl.constexpr, N_SPAN: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [E, M, N], contiguous: one tile, of all experts' one after the other; see `masked_grouped_matmul`."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    e = tl.program_id(0) // (tiles_m * tiles_n)
    row, column = grouped(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, 8)
    row0, col0 = row * BLOCK_M, column * BLOCK_N
    m_flags, n_flags = flags + m_first_flag, flags + n_first_flag
    live = touches_live(m_flags, row, M, M_BLOCK, BLOCK_M, M_SPAN)
    live = live & touches_live(n_flags, column, N, N_BLOCK, BLOCK_N, N_SPAN)
    if E_BLOCK:
        live = live & (tl.load(flags + e_first_flag + e // E_BLOCK) != 0)

    # what is off has no tokens: nothing is read, and the sum is zero
    start = tl.where(e > 0, tl.load(offs + tl.maximum(e - 1, 0)), 0).to(tl.int32)
    stop = tl.where(live, tl.minimum(tl.load(offs + e), S), start).to(tl.int32)

    # addresses are 64 bits wide up to the tile's corner and INDEX inside: operands may hold more than 2**31 elements
    i, j, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    i_wide, j_wide, k_wide = i.to(INDEX), j.to(INDEX), ks.to(INDEX)
    a_at = a + row0.to(tl.int64) * stride_am + start.to(tl.int64) * stride_ak
    b_at = b + col0.to(tl.int64) * stride_bn + start.to(tl.int64) * stride_bk
    a_tile = i_wide[:, None] * stride_am + k_wide[None, :] * stride_ak
    b_tile = k_wide[:, None] * stride_bk + j_wide[None, :] * stride_bn
    a_inside, b_inside = (i < M - row0)[:, None], (j < N - col0)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(start, stop, BLOCK_K):
        k_inside = ks < stop - k
        x = tl.load(a_at + a_tile, mask=a_inside & k_inside[None, :], other=0.0)
        y = tl.load(b_at + b_tile, mask=b_inside & k_inside[:, None], other=0.0)
        acc = tl.dot(x, y, acc, input_precision=INPUT_PRECISION)
        a_at += tl.cast(stride_ak, tl.int64) * BLOCK_K
        b_at += tl.cast(stride_bk, tl.int64) * BLOCK_K

    if M_SPAN > 1 or N_SPAN > 1:  # blocks that end inside the tile
        on = entries_on(m_flags, row0 + i, M, M_BLOCK, M_SPAN)[:, None]
        on = on & entries_on(n_flags, col0 + j, N, N_BLOCK, N_SPAN)[None, :]
        acc = tl.where(on, acc, 0.0)
    at = (e.to(tl.int64) * M + row0) * N + col0 + (i_wide[:, None] * N + j_wide[None, :])
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=a_inside & b_inside)


def choose_tile(
    dtype: torch.dtype,
    precision: str,
    sizes: Sequence[int],
    blocks: Sequence[int],
    arch: str,
    *,
    aligned: bool = True,
) -> Tile:
    """The largest tile for [..., rows, columns] that no block ends inside and that is not mostly outside.

    sizes, blocks: of (rows, columns). aligned: operands can be read 16 bytes at a time.
    """
    tiles = CONFIGS[arch]
    if dtype == torch.float32 and precision == "ieee":
        return tiles["float32"]
    if not aligned:
        return tiles["unaligned"]
    tile = tiles["tf32" if dtype == torch.float32 else "large"]
    fits = all(2 * size > t and block % t == 0 for size, block, t in zip(sizes, blocks, tile))
    # blocks that end inside tiles: some rows are computed for nothing, so few, unless blocks are large
    large = min(*sizes, *(block for block in blocks if block)) >= 256
    return tile if fits or large else tiles["small"]


@lru_cache(maxsize=4096)
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    rows: int,
    columns: int,
    strides: tuple[int, ...],
    blocks: tuple[int, ...],
) -> tuple[int, dict[str, Any]]:
    """(programs for each expert, constants of the kernel and how it is run); strides: of a, then of b."""
    # tokens must be rows in memory: where they are columns, an expert's first one lies anywhere
    aligned = all(line == 1 and apart * dtype.itemsize % 16 == 0 for line, apart in (strides[:2], strides[:1:-1]))
    tile = choose_tile(dtype, precision, (rows, columns), blocks[1:], architecture(device), aligned=aligned)
    far = max(columns, *strides) * max(tile.m, tile.n, tile.k(dtype)) >= 2**31
    options = {
        "E_BLOCK": blocks[0], "M_BLOCK": blocks[1], "N_BLOCK": blocks[2],
        "M_SPAN": span(tile.m, blocks[1]), "N_SPAN": span(tile.n, blocks[2]),
        "INPUT_PRECISION": precision, "INDEX": tl.int64 if far else tl.int32, **tile.meta(dtype),
    }  # fmt: skip
    return triton.cdiv(rows, tile.m) * triton.cdiv(columns, tile.n), options


def masked_grouped_matmul(
    a: Tensor, b: Tensor, offs: Tensor, flags: Tensor, first_flags: Sequence[int], blocks: Sequence[int]
) -> Tensor:
    """Each expert's `a @ b` with zeros in what is off; reads the offsets and the flags on the device only.

    a [M, S] and b [S, N], float32, bfloat16 or float16, any strides; offs: int32 or int64 [E]; accumulates in float32.
    first_flags, blocks: of the experts, the rows and the columns; a block of 0: not masked along it. The result is
    contiguous, and always the same for the same operands, offsets and flags.
    """
    (m, s), n, e, dtype = a.shape, b.shape[1], offs.shape[0], a.dtype
    for first_flag, block, size in zip(first_flags, blocks, (e, m, n), strict=True):
        if block and first_flag + -(-size // block) > flags.numel():
            raise IndexError(f"{flags.numel()} flags for {-(-size // block)} blocks from first_flag {first_flag} on")
    out = a.new_empty(e, m, n)
    if out.numel():
        precision = input_precision(dtype, torch.backends.cuda.matmul.fp32_precision)
        programs, options = _plan(a.device, dtype, precision, m, n, (*a.stride(), *b.stride()), tuple(blocks))
        with torch.cuda.device_of(a):
            masked_grouped_kernel[(e * programs,)](
                a, b, out, offs.contiguous(), flags, m, n, s, *first_flags, *a.stride(), *b.stride(), **options
            )
    return out
