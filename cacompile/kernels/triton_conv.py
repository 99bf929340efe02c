"""The Triton side of masked_conv_dw: which tile, and the launch.

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

from .triton_conv_kernels import add_conv_parts_kernel, masked_conv_dw_kernel
from .triton_tiles import (
    ROWS_AT_ONCE,
    Tile,
    architecture,
    input_precision,
    most_split,
    multiprocessors,
)

CONFIGS: dict[str, dict[str, Tile]] = {
    arch: {
        "large": Tile(128, 128, k_bytes, 8, stages),
        "small": Tile(64, 64, k_bytes, *((8, stages, 1) if arch == "sm_100" else (4, stages, 2))),
        "tiny": Tile(16, 32, 64, 4, 2, 4),
        "float32": Tile(64, 64, 64, 4 if arch == "amd" else 8, 2, 2),
    }
    for arch, k_bytes, stages in (("sm_80", 64, 3), ("sm_90", 128, 3), ("sm_100", 128, 3), ("amd", 64, 2))
}
"""Architecture -> shape -> tile: filters x (taps * channels) x output pixels."""


def choose_tile(dtype: torch.dtype, precision: str, filters: int, columns: int, block: int, arch: str) -> Tile:
    """The largest tile for [filters, columns] of a group that no block ends inside and that is not mostly outside."""
    tiles = CONFIGS[arch]
    if dtype == torch.float32 and precision == "ieee":
        return tiles["float32" if filters > 16 else "tiny"]
    large = tiles["large"]
    if dtype != torch.float32 and 2 * filters > large.m and 2 * columns > large.n and block % large.m == 0:
        return large
    return tiles["small" if 2 * filters > tiles["small"].m and columns > 16 else "tiny"]


class _Plan(NamedTuple):
    """What a launch needs to know that does not depend on values or addresses."""

    tile: Tile
    programs: int
    steps: int
    rest: int
    """How many tiles are split at most."""
    parts: int
    """Into how many parts, all of them together, at most."""
    masks: dict[str, int]
    """Constants of both kernels."""
    product: dict[str, Any]
    """Constants of the product's kernel, and how it is run."""


@lru_cache(maxsize=4096)
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    precision: str,
    weight: tuple[int, ...],
    pixels: int,
    reach: int,
    block: int,
    groups: int,
) -> _Plan:
    """weight: the shape of one group's; reach: elements that an image spans in memory."""
    filters, channels, *kernel = weight
    taps = math.prod(kernel)
    tile = choose_tile(dtype, precision, filters, channels * taps, block, architecture(device))
    one_tap = 2 * channels > tile.n
    lines = groups * triton.cdiv(filters, tile.m)
    columns = taps * triton.cdiv(channels, tile.n) if one_tap else triton.cdiv(taps * channels, tile.n)
    steps, programs = triton.cdiv(pixels, tile.k(dtype)), multiprocessors(device) * tile.per_sm
    rest, split_k = most_split(lines * columns, programs, steps)
    one_block = block % filters == 0 or (block % tile.m == 0 and (groups == 1 or filters % block == 0))
    return _Plan(
        tile=tile,
        programs=programs,
        steps=steps,
        rest=rest,
        parts=rest * split_k,
        masks={
            "BLOCK": block,
            "SPAN": 1 if one_block else triton.next_power_of_2(triton.cdiv(tile.m - 1, block) + 1),
            "LIST": triton.next_power_of_2(lines),
            "ONE_TAP": one_tap,
        },
        product={
            "INPUT_PRECISION": precision,
            "INDEX": tl.int64 if reach >= 2**31 else tl.int32,
            **tile.meta(dtype),
        },
    )


def write_conv_dw(
    out: Tensor,
    grad_out: Tensor,
    x: Tensor,
    flags: Tensor,
    first_flag: int,
    block: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> None:
    """Write all of `out`, a weight gradient with zeros in off blocks of filters; reads the flags on the device only.

    1d or 2d, not transposed; float32, bfloat16 or float16, any strides; accumulates in float32.
    """
    if x.dim() == 3:  # one dimension is two, the first of them of size 1
        out, grad_out, x = out.unsqueeze(2), grad_out.unsqueeze(2), x.unsqueeze(2)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    (batch, _, out_h, out_w), (filters, channels, kernel_h, kernel_w) = grad_out.shape, out.shape
    if grad_out.dtype != x.dtype or x.shape[:2] != (batch, groups * channels) or grad_out.shape[1] != filters:
        raise ValueError(
            f"weight gradient {tuple(out.shape)} in {groups} groups of {grad_out.dtype} {tuple(grad_out.shape)}"
            f" and {x.dtype} {tuple(x.shape)}"
        )
    if first_flag + triton.cdiv(filters, block) > flags.numel():
        raise IndexError(
            f"{flags.numel()} flags for {triton.cdiv(filters, block)} blocks from first_flag {first_flag} on"
        )
    if out.numel() == 0:
        return
    precision = input_precision(x.dtype, torch.backends.cudnn.conv.fp32_precision) if x.itemsize == 4 else "ieee"
    weight = (filters // groups, channels, kernel_h, kernel_w)
    pixels, reach = batch * out_h * out_w, max(_reach(grad_out), _reach(x))
    plan = _plan(x.device, x.dtype, precision, weight, pixels, reach, block, groups)
    parts = x.new_empty((plan.parts, plan.tile.m, plan.tile.n), dtype=torch.float32)
    with torch.cuda.device_of(x):
        masked_conv_dw_kernel[(plan.programs,)](
            out, grad_out, x, flags, parts,
            groups, *weight[:2], pixels, first_flag,
            *x.shape[2:], out_h, out_w, kernel_h, kernel_w,
            *stride, *padding, *dilation,
            *out.stride(), *grad_out.stride(), *x.stride(),
            **plan.masks, **plan.product,
        )  # fmt: skip
        if plan.rest:
            add_conv_parts_kernel[(plan.rest, plan.tile.m // ROWS_AT_ONCE)](
                out, flags, parts,
                groups, *weight[:2], plan.steps, plan.programs, first_flag, kernel_h, kernel_w,
                *out.stride(),
                BLOCK_M=plan.tile.m, BLOCK_N=plan.tile.n, ROWS=ROWS_AT_ONCE, num_warps=4, **plan.masks,
            )  # fmt: skip


def _reach(images: Tensor) -> int:
    """Elements from the first to the last of one image."""
    return sum((size - 1) * stride for size, stride in zip(images.shape[1:], images.stride()[1:]))
