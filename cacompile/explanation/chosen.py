"""Which kernel computes a masked operation, when all, none or some of its blocks are on: `decide` in words."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from cacompile.kernels import masked_bmm, masked_conv_dw, masked_grouped_mm, masked_mm
from cacompile.kernels.blocks import KERNEL_DTYPES
from cacompile.kernels.decide import Way, decide
from cacompile.kernels.dispatch import Choice, choose
from cacompile.kernels.masked_conv import is_sliceable
from cacompile.kernels.masked_grouped_mm import ALWAYS
from cacompile.passes.nodes import hint, sizes

DENSE = {
    masked_mm: "mm",
    masked_bmm: "bmm",
    masked_grouped_mm: "_grouped_mm",
    masked_conv_dw: "convolution_backward",
}
"""Masked operation -> what the library has in its place, which runs while all of its blocks are on."""

WAYS = {
    "slices": "a product for each run of neighbouring blocks that are on, straight into its slice of the result",
    "packed": "what is on side by side, one product, and spread again",
}
"""What `kernel` says -> what that means."""

FEW = 1e-9
"""A share of blocks: as few as can be."""

Shape = tuple[int, int, int, int]
"""(batch, rows, columns, reduction) of a product."""


def is_masked(node: fx.Node) -> bool:
    return node.target in DENSE


def operation(node: fx.Node) -> str:
    """`masked_mm`."""
    return str(node.target).split(".")[1]


def masked_blocks(node: fx.Node) -> tuple[list[int], list[int]]:
    """(first_flags, blocks) of a masked operation, one for each dimension of its result; a block of 0: not masked."""
    if node.target is not masked_conv_dw:
        first_flags, blocks = node.args[-2:]
        return list(first_flags), list(blocks)
    first_flag, block, dim = (int(arg) for arg in node.args[5:8])
    return [first_flag * (i == dim) for i in (0, 1)], [block * (i == dim) for i in (0, 1)]


def kernel(node: fx.Node) -> str:
    """How a masked operation is computed while some of its blocks are off and some are on."""
    on_gpu = node.meta["val"].device.type == "cuda"
    host = node.args[4 if node.target is masked_grouped_mm else 3]
    shape, looks = _shape(node), host is not None or not on_gpu
    has_tiles = on_gpu and node.meta["val"].dtype in KERNEL_DTYPES and _has_tiles(node)
    sliceable = _is_sliceable(node) and not (on_gpu and node.target is masked_grouped_mm)
    below = ALWAYS if node.target is masked_grouped_mm else _choice(node, shape).tiles_below if has_tiles else 0.0

    def way(live: float | None) -> Way:
        return decide(live, has_tiles=has_tiles, sliceable=sliceable, tiles_below=below)

    texts = {
        Way.SLICES: lambda: _library(node, shape),
        Way.TILES: lambda: _tiles(node, shape),
        Way.EVERYTHING: lambda: f"the whole {DENSE[node.target]}, then zeros where blocks are off",
    }
    if not looks:
        text = texts[way(None)]()
        return f"{text}, flags read on the device" if way(None) is Way.TILES else text
    few, many = way(FEW), way(1.0 - FEW)
    return texts[few]() if few is many else f"{texts[few]()} below {below:.0%} on, else {texts[many]()}"


def _has_tiles(node: fx.Node) -> bool:
    """Whether there is a Triton kernel for it."""
    if node.target is not masked_conv_dw:
        return True
    *_, transposed, _output_padding, _groups = node.args
    return len(sizes(node.args[1])) <= 4 and not transposed and node.args[7] == 0


def _shape(node: fx.Node) -> Shape:
    if node.target is masked_conv_dw:
        grad_out, x, weight, *_ = node.args
        *_, transposed, _output_padding, _groups = node.args
        rows, *rest = map(hint, sizes(weight))
        batch, _, *pixels = map(hint, sizes(x if transposed else grad_out))
        return 1, rows, math.prod(rest), batch * math.prod(pixels)
    *batches, rows, columns = map(hint, sizes(node))
    reduction = hint(sizes(node.args[0])[-1])
    return math.prod(batches), rows, columns, reduction


def _choice(node: fx.Node, shape: Shape) -> Choice:
    """As measured on the device; where there is none like it here, what is chosen without a measurement."""
    value = node.meta["val"]
    batch, m, n, k = shape
    op = {masked_bmm: "bmm", masked_conv_dw: "conv"}.get(node.target, "mm")
    k = k // batch if node.target is masked_grouped_mm else k
    device = value.device if value.device.type != "cuda" or torch.cuda.is_available() else torch.device("cpu")
    return choose(device, op, value.dtype, m, n, k)


def _is_sliceable(node: fx.Node) -> bool:
    if node.target is not masked_conv_dw:
        return True
    weight, block, dim = node.args[2], node.args[6], node.args[7]
    *_, transposed, _output_padding, groups = node.args
    whole: Any = hint(sizes(weight)[0])
    return is_sliceable(whole, block, dim, transposed, groups)


def _library(node: fx.Node, shape: Shape) -> str:
    long_run = _choice(node, shape).long_run
    if math.isinf(long_run):
        return "packed"
    if long_run <= max(masked_blocks(node)[1]):
        return "slices"
    return f"slices, or packed where runs are shorter than {long_run:g} rows"


def _tiles(node: fx.Node, shape: Shape) -> str:
    """With the tile's size, where triton and the GPU are there to ask; of operands that are aligned in memory."""
    value = node.meta["val"]
    try:
        from cacompile.kernels import triton_conv, triton_grouped, triton_matmul
        from cacompile.kernels.triton_tiles import architecture, input_precision
    except ImportError:
        return "Triton kernel"
    # filters of one pixel are a plain product, for some layouts in memory
    one_pixel = node.target is masked_conv_dw and set(map(hint, sizes(node)[2:])) == {1}
    if one_pixel or (arch := _architecture(value.device, architecture)) is None:
        return "Triton kernel"
    batch, m, n, _ = shape
    _, blocks = masked_blocks(node)
    setting = torch.backends.cudnn.conv if node.target is masked_conv_dw else torch.backends.cuda.matmul
    precision = input_precision(value.dtype, setting.fp32_precision) if value.itemsize == 4 else "ieee"
    tile: Any
    if node.target is masked_conv_dw:
        groups: Any = node.args[-1]
        block = blocks[0]
        tile = triton_conv.choose_tile(value.dtype, precision, m // groups, n, block, arch)
    elif node.target is masked_grouped_mm:
        tile = triton_grouped.choose_tile(value.dtype, precision, (m, n), blocks[1:], arch)
    else:
        three = blocks if node.target is masked_bmm else [0, *blocks]
        tile = triton_matmul.choose_tile(value.dtype, precision, (batch, m, n), three, arch)
    return (
        f"Triton kernel, tiles of {tile.m} x {tile.n} x {tile.k(value.dtype)}, {tile.warps} warps, {tile.stages} stages"
    )


def _architecture(device: torch.device, of: Any) -> str | None:
    return of(device) if torch.cuda.is_available() else None
