"""The Triton side of masked_mm and masked_bmm: one kernel, a matrix being a batch of one.

Needs triton, which torch for CPUs comes without: imported at the first call with CUDA tensors.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_flags

AXES = {"batch": 0, "rows": 1, "columns": 2}


class Tile(NamedTuple):
    """One program's share of the output in rows and columns, its step along the reduction in bytes, and its warps."""

    m: int
    n: int
    k_bytes: int
    warps: int

    def meta(self, dtype: torch.dtype) -> dict[str, int]:
        """The keywords of a launch."""
        return {
            "BLOCK_M": self.m,
            "BLOCK_N": self.n,
            "BLOCK_K": self.k_bytes // dtype.itemsize,
            "num_warps": self.warps,
        }


CONFIGS = (  # (smallest M * N of one matrix, tile): the first that fits is taken. Safe, not yet fast
    (2048 * 2048, Tile(128, 128, 64, 8)),
    (0, Tile(64, 64, 64, 4)),
)


def input_precision(dtype: torch.dtype, allowed: str) -> str:
    """TF32 only for float32, and only where torch's own setting (`fp32_precision`) allows it."""
    return "tf32" if dtype == torch.float32 and allowed == "tf32" else "ieee"


@triton.jit(do_not_specialize=["flags"])  # where a slot starts is no reason to compile again
def masked_matmul_kernel(
    a, b, out, flags,
    M, N, K, block,
    stride_ae, stride_am, stride_ak,
    stride_be, stride_bk, stride_bn,
    AXIS: tl.constexpr, INPUT_PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per tile of one matrix of out [E, M, N], contiguous; `flags` starts at the first block's flag."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * tiles_n
    e = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    row0 = tile // tiles_n * BLOCK_M
    col0 = tile % tiles_n * BLOCK_N
    rows = row0 + tl.arange(0, BLOCK_M)
    cols = col0 + tl.arange(0, BLOCK_N)
    # addresses are 64 bits wide up to the tile's corner and INDEX inside: operands may hold more than 2**31 elements
    i, j = tl.arange(0, BLOCK_M).to(INDEX), tl.arange(0, BLOCK_N).to(INDEX)
    ks = tl.arange(0, BLOCK_K).to(INDEX)
    # a tile may straddle blocks: one flag a row or column, and the reduction is skipped when none of them is on
    if AXIS == 0:
        on = tl.load(flags + e // block + tl.zeros_like(rows)[:, None]) != 0
    elif AXIS == 1:
        on = (tl.load(flags + rows // block, mask=rows < M, other=0) != 0)[:, None]
    else:
        on = (tl.load(flags + cols // block, mask=cols < N, other=0) != 0)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.max(tl.max(on.to(tl.int32), 1), 0) != 0:
        a_corner = a + e.to(tl.int64) * stride_ae + row0.to(tl.int64) * stride_am
        b_corner = b + e.to(tl.int64) * stride_be + col0.to(tl.int64) * stride_bn
        a_inside = i[:, None] * stride_am + ks[None, :] * stride_ak
        b_inside = ks[:, None] * stride_bk + j[None, :] * stride_bn
        for k in range(0, K, BLOCK_K):
            in_k = ks < K - k
            x = tl.load(a_corner + a_inside, mask=(rows < M)[:, None] & in_k[None, :], other=0.0)
            y = tl.load(b_corner + b_inside, mask=in_k[:, None] & (cols < N)[None, :], other=0.0)
            acc = tl.dot(x, y, acc, input_precision=INPUT_PRECISION)
            a_corner += tl.cast(stride_ak, tl.int64) * BLOCK_K
            b_corner += tl.cast(stride_bk, tl.int64) * BLOCK_K
    # always stored: an off block reads as zeros, never as what was in memory, and never as NaN * 0
    acc = tl.where(on, acc, 0.0)
    corner = out + (e.to(tl.int64) * M + row0) * N + col0
    inside = i[:, None] * N + j[None, :]
    tl.store(corner + inside, acc.to(out.dtype.element_ty), mask=(rows < M)[:, None] & (cols < N)[None, :])


def masked_matmul(a: Tensor, b: Tensor, flags: Tensor, slot: int, block: int, axis: str) -> Tensor:
    """`a @ b` with zeros in off blocks of `axis`, "batch", "rows" or "columns"; reads the flags on the device only.

    a [E, M, K] and b [E, K, N], float32, bfloat16 or float16, any strides; accumulates in float32.
    """
    if a.dtype != b.dtype or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise ValueError(f"masked product of {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}")
    (batch, m, k), n = a.shape, b.shape[2]
    out = a.new_empty(batch, m, n)
    flags = block_flags(flags, slot, block, out.shape[AXES[axis]])
    if out.numel() == 0:
        return out
    tile = next(tile for least, tile in CONFIGS if m * n >= least)
    grid = (batch * triton.cdiv(m, tile.m) * triton.cdiv(n, tile.n),)
    far = max(n, *a.stride(), *b.stride()) * max(tile.m, tile.n) >= 2**31
    with torch.cuda.device_of(a):
        masked_matmul_kernel[grid](
            a, b, out, flags,
            m, n, k, block,
            *a.stride(), *b.stride(),
            AXIS=AXES[axis], INPUT_PRECISION=input_precision(a.dtype, torch.backends.cuda.matmul.fp32_precision),
            INDEX=tl.int64 if far else tl.int32, **tile.meta(a.dtype),
        )  # fmt: skip
    return out
