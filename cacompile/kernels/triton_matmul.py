"""The Triton side of masked_mm and masked_bmm: one persistent kernel, a matrix being a batch of one.

Needs triton, which torch for CPUs comes without: imported at the first call with CUDA tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_boxes import WITH_TMA, boxed, takes_box
from .triton_matmul_kernels import add_parts_kernel, masked_matmul_kernel
from .triton_tiles import (
    ROWS_AT_ONCE,
    Tile,
    architecture,
    cuts,
    input_precision,
    list_length,
    live_tiles,
    most_cut,
    multiprocessors,
    span,
)

CONFIGS: dict[str, dict[str, Tile]] = {
    "sm_80": {
        "wide": Tile(128, 256, 64, 8, 3),
        "tall": Tile(256, 128, 64, 8, 3),
        "square": Tile(128, 128, 64, 4, 4),
        "flat": Tile(64, 256, 64, 4, 4),
        "slim": Tile(256, 64, 64, 4, 4),
        "small": Tile(64, 64, 128, 4, 3, 2),
        "tf32": Tile(128, 128, 64, 8, 3),
        "float32": Tile(64, 64, 64, 8, 3, 2),
    },
    "sm_90": {
        "wide": Tile(128, 256, 128, 8, 4),
        "tall": Tile(256, 128, 128, 8, 4),
        "square": Tile(128, 128, 128, 8, 4),
        "flat": Tile(64, 256, 128, 4, 4),
        "slim": Tile(256, 64, 128, 8, 4),
        "small": Tile(64, 64, 128, 4, 4, 2),
        "tf32": Tile(128, 128, 128, 8, 4),
        "float32": Tile(64, 64, 64, 8, 3, 2),
    },
    "sm_100": {  # warp-specialized, and then 128 x 256 would spill 32 to 92 bytes (triton 3.7.1, 3.6)
        "square": Tile(128, 128, 128, 8, 4),
        "flat": Tile(64, 256, 128, 8, 4),
        "slim": Tile(256, 64, 128, 8, 4),
        "small": Tile(64, 64, 128, 8, 4, 2),
        "tf32": Tile(128, 128, 128, 8, 4),
        "float32": Tile(64, 64, 64, 8, 3, 2),
    },
    "amd": {
        "wide": Tile(128, 256, 64, 8, 2),
        "tall": Tile(256, 128, 64, 8, 2),
        "square": Tile(128, 128, 128, 4, 2),
        "flat": Tile(64, 256, 64, 4, 2),
        "slim": Tile(256, 64, 64, 4, 2),
        "small": Tile(64, 64, 128, 4, 2, 2),
        "tf32": Tile(128, 128, 128, 4, 2),
        "float32": Tile(64, 64, 64, 4, 2, 2),
    },
}
"""Architecture -> shape -> tile; `choose_tile` takes the first that fits. 16-bit operands and TF32 on tensor cores."""


def choose_tile(dtype: torch.dtype, precision: str, sizes: Sequence[int], blocks: Sequence[int], arch: str) -> Tile:
    """The largest tile for out [E, M, N] that no block ends inside and that is not mostly outside."""
    tiles = CONFIGS[arch]
    if dtype == torch.float32:
        if precision == "ieee":
            return tiles["float32"]
        names: tuple[str, ...] = ("tf32",)
    else:
        names = ("wide", "tall", "square", "flat", "slim")
    for tile in (tiles[name] for name in names if name in tiles):
        if all(2 * size > t and block % t == 0 for size, block, t in zip(sizes[1:], blocks[1:], tile)):
            return tile
    # blocks that end inside tiles: some rows are computed for nothing, so few, unless blocks are large
    large = min(*sizes[1:], *(block for block in blocks[1:] if block)) >= 256
    return tiles[names[-1] if dtype == torch.float32 else "square"] if large else tiles["small"]


def masked_matmul(
    a: Tensor, b: Tensor, flags: Tensor, slots: Sequence[int], blocks: Sequence[int], host: Tensor | None = None
) -> Tensor:
    """`a @ b` with zeros in what is off; reads the flags on the device only.

    a [E, M, K] and b [E, K, N], float32, bfloat16 or float16, any strides; accumulates in float32. slots, blocks: of
    the batch, the rows and the columns; a block of 0: not masked along it. host: the flags in CPU memory, where the
    launch may look; it then leaves out what has nothing to do.
    """
    return _launch(a, b, flags, slots, blocks, host, False, None)[0]


def masked_matmul_stats(
    a: Tensor, b: Tensor, flags: Tensor, slots: Sequence[int], blocks: Sequence[int], estimate: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """`masked_matmul`, and sums over each block from its accumulators, always in the same order.

    estimate: [E, M, N] of any dtype, or None, where the second half is zeros. Sums are float32 [2, blocks of E, of M,
    of N], of squares and of products with the estimate; None where blocks end inside tiles.
    """
    return _launch(a, b, flags, slots, blocks, None, True, estimate)


def _launch(
    a: Tensor,
    b: Tensor,
    flags: Tensor,
    slots: Sequence[int],
    blocks: Sequence[int],
    host: Tensor | None,
    stats: bool,
    estimate: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    if a.dtype != b.dtype or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise ValueError(f"masked product of {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}")
    sizes = (*a.shape[:2], b.shape[2])
    (e, m, n), k = sizes, a.shape[2]
    for slot, block, size in zip(slots, blocks, sizes):
        if block and slot + triton.cdiv(size, block) > flags.numel():
            raise IndexError(f"{flags.numel()} flags for {triton.cdiv(size, block)} blocks from slot {slot} on")
    out = a.new_empty(sizes)
    arch, precision = architecture(a.device), input_precision(a.dtype, torch.backends.cuda.matmul.fp32_precision)
    tile = choose_tile(a.dtype, precision, sizes, blocks, arch)
    tiles = (e, triton.cdiv(m, tile.m), triton.cdiv(n, tile.n))
    stats = stats and all(block % t == 0 for block, t in zip(blocks, (1, tile.m, tile.n)))
    estimate = None if estimate is None else estimate.contiguous()
    chunks = tile.m // ROWS_AT_ONCE if stats else 1
    sums = torch.zeros(2, *tiles, chunks, device=a.device) if stats else None
    if out.numel():
        programs = multiprocessors(a.device) * tile.per_sm
        steps = triton.cdiv(k, tile.k(a.dtype))
        rest, cut = _rest(sizes, tile, slots, blocks, host, programs, steps)
        parts = a.new_empty((rest * cut, tile.m, tile.n), dtype=torch.float32)
        masks = {
            "E_BLOCK": blocks[0], "M_BLOCK": blocks[1], "N_BLOCK": blocks[2],
            "M_SPAN": span(tile.m, blocks[1]), "N_SPAN": span(tile.n, blocks[2]),
            "E_LIST": list_length(e, 1, blocks[0]),
            "M_LIST": list_length(m, tile.m, blocks[1]), "N_LIST": list_length(n, tile.n, blocks[2]),
            "STATS": stats, "DOT": stats and estimate is not None, "CHUNKS": chunks,
        }  # fmt: skip
        turned = a.stride(1) == 1, b.stride(1) == 1
        tensor_cores = a.element_size() == 2 or precision == "tf32"
        tma = arch in WITH_TMA and tensor_cores and takes_box(a, turned[0]) and takes_box(b, turned[1])
        specialize = (
            tma and arch == "sm_100" and a.element_size() == 2
        )  # float32 would crash the compiler, triton 3.7.1
        far = max(n, *a.stride(), *b.stride()) * max(tile.m, tile.n) >= 2**31
        meta = tile.meta(a.dtype)
        with torch.cuda.device_of(a):
            masked_matmul_kernel[(programs,)](
                boxed(a, turned[0], (tile.m, meta["BLOCK_K"])) if tma else a,
                boxed(b, turned[1], (meta["BLOCK_K"], tile.n)) if tma else b,
                out, flags, parts, sums, estimate,
                e, m, n, k, *slots, *a.stride(), *b.stride(),
                A_TURNED=turned[0], B_TURNED=turned[1], TMA=tma, WARP_SPECIALIZE=specialize,
                INPUT_PRECISION=precision, INDEX=tl.int64 if far else tl.int32, **masks, **meta,
            )  # fmt: skip
            if rest:
                add_parts_kernel[(rest, tile.m // ROWS_AT_ONCE)](
                    out, flags, parts, sums, estimate, e, m, n, steps, programs, *slots,
                    BLOCK_M=tile.m, BLOCK_N=tile.n, ROWS=ROWS_AT_ONCE, num_warps=4, **masks,
                )  # fmt: skip
    if sums is not None:
        sums = sum_blocks(sums.sum(-1), [block // t for block, t in zip(blocks, (1, tile.m, tile.n))])
    return out, sums


def _rest(
    sizes: Sequence[int],
    tile: Tile,
    slots: Sequence[int],
    blocks: Sequence[int],
    host: Tensor | None,
    programs: int,
    steps: int,
) -> tuple[int, int]:
    """How many tiles are cut at most, and into how many parts each: no more than 2 * programs parts in all."""
    lengths = (1, tile.m, tile.n)
    if host is None:
        return most_cut(math.prod(map(triton.cdiv, sizes, lengths)), programs, steps)
    live = 1
    for size, length, slot, block in zip(sizes, lengths, slots, blocks):
        flags = host[slot : slot + triton.cdiv(size, block)].tolist() if block else []
        live *= live_tiles(flags, length, block, size)
    cut = cuts(live, programs, steps)
    return (live % programs, cut) if cut > 1 else (0, 0)


def sum_blocks(values: Tensor, blocks: Sequence[int]) -> Tensor:
    """[..., E, M, N] summed over each block of its last three dimensions, always in the same order; 0: over all."""
    for dim, block in zip((-3, -2, -1), blocks):
        size = values.shape[dim]
        padding = [0, 0] * (-dim - 1) + [0, -size % (block or size)]
        padded = torch.nn.functional.pad(values, padding) if padding[-1] else values
        values = padded.unflatten(dim, (-1, block or size)).sum(dim)
    return values
