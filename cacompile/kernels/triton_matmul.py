"""The Triton side of masked_mm and masked_bmm: one persistent kernel, a matrix being a batch of one.

Needs triton, which torch for CPUs comes without: imported at the first call with CUDA tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import read_flags
from .triton_boxes import WITH_TMA, Boxes
from .triton_matmul_kernels import add_parts_kernel, masked_matmul_kernel
from .triton_tiles import (
    ROWS_AT_ONCE,
    Tile,
    architecture,
    input_precision,
    list_length,
    live_tiles,
    most_split,
    multiprocessors,
    span,
    split_k_of,
)

CONFIGS: dict[str, dict[str, Tile]] = {
    "sm_80": {  # 128 x 256 would spill up to 168 bytes
        "square": Tile(128, 128, 64, 8, 4),
        "flat": Tile(64, 256, 64, 8, 4),
        "slim": Tile(256, 64, 64, 8, 4),
        "small": Tile(64, 64, 128, 4, 3, 2),
        "unaligned": Tile(128, 64, 64, 8, 3),
        "tf32": Tile(128, 128, 64, 8, 3),
        "float32": Tile(64, 64, 64, 4, 2, 2),
    },
    "sm_90": {
        "wide": Tile(128, 256, 128, 8, 4),
        "tall": Tile(256, 128, 128, 8, 4),
        "square": Tile(128, 128, 128, 8, 4),
        "flat": Tile(64, 256, 128, 4, 4),
        "slim": Tile(256, 64, 128, 8, 4),
        "small": Tile(64, 64, 128, 4, 4, 2),
        "unaligned": Tile(128, 128, 64, 8, 4),
        "tf32": Tile(128, 128, 128, 8, 4),
        "float32": Tile(64, 64, 64, 4, 2, 2),
    },
    "sm_100": {  # warp-specialized, and then 128 x 256 would spill 32 to 92 bytes
        "square": Tile(128, 128, 128, 8, 4),
        "flat": Tile(64, 256, 128, 8, 4),
        "slim": Tile(256, 64, 128, 8, 4),
        "small": Tile(64, 64, 128, 8, 4),
        "unaligned": Tile(128, 64, 64, 8, 4),
        "tf32": Tile(128, 128, 128, 8, 4),
        "float32": Tile(64, 64, 64, 8, 3),
    },
    "amd": {
        "wide": Tile(128, 256, 64, 8, 2),
        "tall": Tile(256, 128, 64, 8, 2),
        "square": Tile(128, 128, 64, 8, 2),
        "flat": Tile(64, 256, 64, 4, 2),
        "slim": Tile(256, 64, 64, 4, 2),
        "small": Tile(64, 64, 128, 4, 2, 2),
        "unaligned": Tile(128, 128, 64, 8, 2),
        "tf32": Tile(128, 128, 128, 4, 2),
        "float32": Tile(64, 64, 64, 4, 2, 2),
    },
}
"""Architecture -> shape -> tile; `choose_tile` takes the first that fits. 16-bit operands and TF32 on tensor cores.

As large as they can be without spilling a register, by the compilers of triton 3.6 and 3.7.1.
"""


def choose_tile(
    dtype: torch.dtype,
    precision: str,
    sizes: Sequence[int],
    blocks: Sequence[int],
    arch: str,
    *,
    aligned: bool = True,
) -> Tile:
    """The largest tile for out [E, M, N] that no block ends inside and that is not mostly outside.

    aligned: operands can be read 16 bytes at a time.
    """
    tiles = CONFIGS[arch]
    if dtype == torch.float32:
        if precision == "ieee":
            return tiles["float32"]
        names: tuple[str, ...] = ("tf32",)
    elif not aligned:
        names = ("unaligned",)
    else:
        names = ("wide", "tall", "square", "flat", "slim")
    for tile in (tiles[name] for name in names if name in tiles):
        if all(2 * size > t and block % t == 0 for size, block, t in zip(sizes[1:], blocks[1:], tile)):
            return tile
    # blocks that end inside tiles: some rows are computed for nothing, so few, unless blocks are large
    large = min(*sizes[1:], *(block for block in blocks[1:] if block)) >= 256
    return tiles["square" if "square" in names else names[0]] if large else tiles["small"]


def masked_matmul(
    a: Tensor, b: Tensor, flags: Tensor, first_flags: Sequence[int], blocks: Sequence[int], host: Tensor | None = None
) -> Tensor:
    """`a @ b` with zeros in what is off; reads the flags on the device only.

    a [E, M, K] and b [E, K, N], float32, bfloat16 or float16, any strides; accumulates in float32. first_flags,
    blocks: of the batch, the rows and the columns; a block of 0: not masked along it. host: the flags in CPU memory,
    where the launch may look; it then leaves out what has nothing to do.
    """
    return _launch(a, b, flags, first_flags, blocks, host)


class _Plan(NamedTuple):
    """What a launch needs to know that does not depend on values or addresses."""

    tile: Tile
    tiles: tuple[int, int, int]
    programs: int
    steps: int
    masks: dict[str, int]
    """Constants of both kernels."""
    product: dict[str, Any]
    """Constants of the product's kernel, and how it is run."""
    adders: int
    """Warps that add up split tiles: each thread reads 16 bytes at a time."""
    boxes: tuple[Boxes, Boxes] | None
    """Of a and b, where the tensor memory accelerator can read both."""


@lru_cache(maxsize=4096)
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    blocks: tuple[int, ...],
) -> _Plan:
    """sizes: E, M, N, K; strides: of a, then of b."""
    e, m, n, k = sizes
    arch = architecture(device)
    aligned = all(_in_sixteens(strides[i : i + 3] if e > 1 else strides[i + 1 : i + 3], dtype) for i in (0, 3))
    tile = choose_tile(dtype, precision, sizes[:3], blocks, arch, aligned=aligned)
    far = max(n, *strides) * max(tile.m, tile.n) >= 2**31
    turned = strides[1] == 1, strides[4] == 1
    tensor_cores = dtype.itemsize == 2 or precision == "tf32"
    a_boxes = Boxes.of((e, m, k), strides[:3], dtype.itemsize, turned[0], (tile.m, tile.k(dtype)))
    b_boxes = Boxes.of((e, k, n), strides[3:], dtype.itemsize, turned[1], (tile.k(dtype), tile.n))
    return _Plan(
        tile=tile,
        tiles=(e, triton.cdiv(m, tile.m), triton.cdiv(n, tile.n)),
        programs=multiprocessors(device) * tile.per_sm,
        steps=triton.cdiv(k, tile.k(dtype)),
        masks={
            "E_BLOCK": blocks[0], "M_BLOCK": blocks[1], "N_BLOCK": blocks[2],
            "M_SPAN": span(tile.m, blocks[1]), "N_SPAN": span(tile.n, blocks[2]),
            "E_LIST": list_length(e, 1, blocks[0]),
            "M_LIST": list_length(m, tile.m, blocks[1]), "N_LIST": list_length(n, tile.n, blocks[2]),
        },
        product={
            "A_TURNED": turned[0], "B_TURNED": turned[1],
            "WARP_SPECIALIZE": arch == "sm_100" and dtype.itemsize == 2,  # float32 crashes the compiler, triton 3.7.1
            "INPUT_PRECISION": precision, "INDEX": tl.int64 if far else tl.int32, **tile.meta(dtype),
        },
        adders=4 if arch == "amd" else 8,
        boxes=(a_boxes, b_boxes) if a_boxes and b_boxes and arch in WITH_TMA and tensor_cores else None,
    )  # fmt: skip


def _in_sixteens(strides: Sequence[int], dtype: torch.dtype) -> bool:
    """Whether one dimension is contiguous, and its neighbours in memory start at multiples of 16 bytes."""
    return 1 in strides and all(stride == 1 or stride * dtype.itemsize % 16 == 0 for stride in strides)


def _launch(
    a: Tensor,
    b: Tensor,
    flags: Tensor,
    first_flags: Sequence[int],
    blocks: Sequence[int],
    host: Tensor | None,
) -> Tensor:
    (e, m, k), n, dtype = a.shape, b.shape[2], a.dtype
    if dtype != b.dtype or b.shape[:2] != (e, k):
        raise ValueError(f"masked product of {dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}")
    sizes = (e, m, n)
    for first_flag, block, size in zip(first_flags, blocks, sizes):
        if block and first_flag + -(-size // block) > flags.numel():
            raise IndexError(f"{flags.numel()} flags for {-(-size // block)} blocks from first_flag {first_flag} on")
    precision = input_precision(dtype, torch.backends.cuda.matmul.fp32_precision) if dtype.itemsize == 4 else "ieee"
    plan = _plan(a.device, dtype, precision, (*sizes, k), (*a.stride(), *b.stride()), tuple(blocks))
    tile = plan.tile
    out = a.new_empty(sizes)
    if out.numel():
        rest, split_k = _rest(sizes, plan, first_flags, blocks, host)
        parts = a.new_empty((rest * split_k, tile.m, tile.n), dtype=torch.float32)
        boxes = plan.boxes if (a.data_ptr() | b.data_ptr()) % 16 == 0 else None
        with torch.cuda.device_of(a):
            masked_matmul_kernel[(plan.programs,)](
                boxes[0].over(a) if boxes else a,
                boxes[1].over(b) if boxes else b,
                out, flags, parts,
                *sizes, k, *first_flags, *a.stride(), *b.stride(),
                TMA=boxes is not None, **plan.product, **plan.masks,
            )  # fmt: skip
            if rest:
                add_parts_kernel[(rest, tile.m // ROWS_AT_ONCE)](
                    out, flags, parts, *sizes, plan.steps, plan.programs, *first_flags,
                    BLOCK_M=tile.m, BLOCK_N=tile.n, ROWS=ROWS_AT_ONCE, num_warps=plan.adders, **plan.masks,
                )  # fmt: skip
    return out


def _rest(
    sizes: Sequence[int], plan: _Plan, first_flags: Sequence[int], blocks: Sequence[int], host: Tensor | None
) -> tuple[int, int]:
    """How many tiles are split at most, and into how many parts each: no more than 2 * programs parts in all."""
    if host is None:
        return most_split(math.prod(plan.tiles), plan.programs, plan.steps)
    live = 1
    for size, length, first_flag, block, tiles in zip(sizes, (1, *plan.tile), first_flags, blocks, plan.tiles):
        live *= live_tiles(read_flags(host, first_flag, block, size), length, block, size) if block else tiles
    split_k = split_k_of(live, plan.programs, plan.steps)
    return (live % plan.programs, split_k) if split_k > 1 else (0, 0)
