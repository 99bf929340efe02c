"""`cacompile::masked_conv_dw`: the weight gradient of a convolution without the filters that are off this step.

_, dw, _ = convolution_backward(dy, x, w, ..., [False, True, False])  ->  dw = masked_conv_dw(dy, x, w, flags, ...)
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from cacompile.torch_internals import FakeTensorMode, kernel_of

from .blocks import (
    KERNEL_DTYPES,
    Run,
    bundles,
    clear_gaps,
    length,
    live_runs,
    read_flags,
    readable,
    slices,
    spread,
    without_autocast,
    zero_off_blocks,
)
from .decide import Way, decide
from .dispatch import choose

_LIBRARY = torch.library.Library("cacompile", "FRAGMENT")
# the strides of the result follow those of the operands, so Inductor must keep them, as it does for the library's own
_LIBRARY.define(
    "masked_conv_dw(Tensor grad_out, Tensor x, Tensor weight, Tensor flags, Tensor? host, int first_flag, int block,"
    " int dim, SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding,"
    " SymInt groups) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
masked_conv_dw = torch.ops.cacompile.masked_conv_dw.default
_convolution_backward = torch.ops.aten.convolution_backward.default
_convolution_backward_kernel = kernel_of(_convolution_backward)
_WEIGHT_ONLY = [False, True, False]


def _library(grad_out: Tensor, x: Tensor, weight: Tensor, *conv: Any) -> Tensor:
    """The weight gradient as PyTorch has it; `conv`: stride, padding, dilation, transposed, output_padding, groups."""
    return _convolution_backward(grad_out, x, weight, None, *conv, _WEIGHT_ONLY)[1]


def _promised(grad_out: Tensor, x: Tensor, weight: Tensor, *conv: Any) -> tuple[int, ...]:
    """The strides of the weight gradient that the compiler takes for granted: those of the library's fake."""
    stride, padding, dilation, transposed, output_padding, groups = conv
    return _promised_for(
        grad_out.shape, grad_out.stride(), x.shape, x.stride(), weight.shape, weight.stride(), x.dtype, x.device,
        *stride, *padding, *dilation, transposed, *output_padding, groups)  # fmt: skip


# the rules for a convolution's memory format are torch's and many: ask it, 0.7 ms, once a shape
@lru_cache(maxsize=1024)
def _promised_for(*key: Any) -> tuple[int, ...]:
    """One flat key, which is quick to make: shape and strides of the operands, dtype, device, each item of `conv`."""
    layouts, dtype, device, conv = key[:6], key[6], key[7], iter(key[8:])
    n = len(layouts[0]) - 2
    stride, padding, dilation = ([*islice(conv, n)] for _ in range(3))
    transposed, *output_padding, groups = conv
    with FakeTensorMode():
        fakes = [torch.empty_strided(*each, dtype=dtype, device=device) for each in zip(layouts[::2], layouts[1::2])]
        return _library(*fakes, stride, padding, dilation, transposed, output_padding, groups).stride()


def _whole(grad_out: Tensor, x: Tensor, weight: Tensor, *conv: Any) -> Tensor:
    """The library's gradient, copied where its strides are not the promised ones."""
    return _as_promised(_library(grad_out, x, weight, *conv), grad_out, x, weight, *conv)


def _as_promised(dw: Tensor, grad_out: Tensor, x: Tensor, weight: Tensor, *conv: Any) -> Tensor:
    if x.is_cpu and x.shape[0] > 1 and weight.shape[2:].numel() > 1:
        return dw  # on CPUs only 1x1 filters, and a batch of one or none, can be taken for another format
    strides = _promised(grad_out, x, weight, *conv)
    return dw if dw.stride() == strides else dw.new_empty_strided(dw.shape, strides).copy_(dw)


def masked_conv_dw_reference(
    grad_out: Tensor, x: Tensor, weight: Tensor, flags: Tensor, host: Tensor | None, first_flag: int, block: int,
    dim: int, *conv: Any,
) -> Tensor:  # fmt: skip
    """The weight gradient with exact zeros where the block of an index of weight dim `dim` is off.

    Operands and `conv` (stride, padding, dilation, transposed, output_padding, groups) as for convolution_backward, in
    1, 2 or 3 dimensions; flags: 1-D uint8 on the same device; host: as for masked_mm. dim 0 of an ordinary and dim 1
    of a transposed convolution are the output channels. The result has weight's shape and the strides
    convolution_backward would give.
    """
    full = _whole(grad_out, x, weight, *conv)
    return zero_off_blocks(full, flags, (0,) * dim + (first_flag,), (0,) * dim + (block,))


@torch.library.register_fake("cacompile::masked_conv_dw", lib=_LIBRARY)
def _fake(
    grad_out: Tensor, x: Tensor, weight: Tensor, flags: Tensor, host: Tensor | None, first_flag: int, block: int,
    dim: int, *conv: Any,
) -> Tensor:  # fmt: skip
    return _library(grad_out, x, weight, *conv)


def _cpu(
    grad_out: Tensor, x: Tensor, weight: Tensor, flags: Tensor, host: Tensor | None, first_flag: int, block: int,
    dim: int, stride: list[int], padding: list[int], dilation: list[int], transposed: bool, output_padding: list[int],
    groups: int,
) -> Tensor:  # fmt: skip
    if 0 in read_flags(flags, first_flag, block, weight.shape[dim]) or torch.is_autocast_enabled("cpu"):
        return _mixed(
            grad_out, x, weight, flags, flags, first_flag, block, dim,
            stride, padding, dilation, transposed, output_padding, groups)  # fmt: skip
    # all on: bit for bit what this op stands in for. Spelled out, for layers and stars take a third of its overhead
    conv = stride, padding, dilation, transposed, output_padding, groups
    dw = _convolution_backward_kernel(grad_out, x, weight, None, *conv, _WEIGHT_ONLY)[1]
    return dw if x.shape[0] > 1 and weight.shape[2:].numel() > 1 else _as_promised(dw, grad_out, x, weight, *conv)


@without_autocast("cuda")
def _cuda(
    grad_out: Tensor, x: Tensor, weight: Tensor, flags: Tensor, host: Tensor | None, first_flag: int, block: int,
    dim: int, *conv: Any,
) -> Tensor:  # fmt: skip
    if readable(host, x):
        return _mixed(grad_out, x, weight, flags, host, first_flag, block, dim, *conv)
    if decide(None, has_tiles=has_tiles(grad_out, x, dim, *conv), sliceable=False) is Way.TILES:
        return convolve_tiles(grad_out, x, weight, flags, first_flag, block, dim, *conv)
    # no kernel of ours: correct and without a sync, but the off filters are computed and thrown away
    return masked_conv_dw_reference(grad_out, x, weight, flags, None, first_flag, block, dim, *conv)


@without_autocast("cpu")
def _mixed(
    grad_out: Tensor, x: Tensor, weight: Tensor, flags: Tensor, host: Tensor, first_flag: int, block: int, dim: int,
    *conv: Any,
) -> Tensor:  # fmt: skip
    """`host` are the flags in CPU memory, by which the way is chosen; all on, it is the library's."""
    size = weight.shape[dim]
    runs = live_runs(host, first_flag, block, size)
    *_, transposed, _, groups = conv
    pixels = (x if transposed else grad_out)[:, 0].numel()
    choice = choose(x.device, "conv", x.dtype, weight.shape[0], math.prod(weight.shape[1:]), pixels)
    way = decide(
        length(runs) / size if runs else 0.0,
        has_tiles=has_tiles(grad_out, x, dim, *conv),
        sliceable=is_sliceable(size, block, dim, transposed, groups),
        tiles_below=choice.tiles_below,
    )
    if way is Way.WHOLE:
        return _whole(grad_out, x, weight, *conv)
    if way is Way.NOTHING:
        return grad_out.new_empty_strided(weight.shape, _promised(grad_out, x, weight, *conv)).zero_()
    if way is Way.TILES:
        return convolve_tiles(grad_out, x, weight, flags, first_flag, block, dim, *conv)
    if way is Way.EVERYTHING:
        return masked_conv_dw_reference(grad_out, x, weight, flags, None, first_flag, block, dim, *conv)
    return convolve_runs(grad_out, x, weight, runs, choice.long_run, dim, *conv)


def is_sliceable(size: int, block: int, dim: int, transposed: bool, groups: int) -> bool:
    """Whether the library can compute blocks of filters alone: no group of a convolution can be parted."""
    return groups == 1 or not (transposed or dim != 0 or block % (size // groups))


@torch.no_grad()
def convolve_runs(
    grad_out: Tensor, x: Tensor, weight: Tensor, runs: Sequence[Run], long_run: float, dim: int, *conv: Any
) -> Tensor:
    """The library's gradient for the `runs` of weight dim `dim`, each bundle of them in one call; zeros elsewhere.

    With groups, runs must be whole groups of an ordinary convolution, along dim 0.
    """
    out = grad_out.new_empty_strided(weight.shape, _promised(grad_out, x, weight, *conv))
    clear_gaps(out, runs, dim)
    *shape, transposed, output_padding, groups = conv
    for bundle in bundles(runs, long_run):
        some_grad, some_x, some_groups, live = grad_out, x, groups, length(bundle)
        if groups > 1:  # their inputs alone
            outputs, inputs = weight.shape[0] // groups, weight.shape[1]
            some_x = _pack(x, [(lo // outputs * inputs, hi // outputs * inputs) for lo, hi in bundle])
            some_groups = live // outputs
        if (dim == 0) != transposed:
            some_grad = _pack(grad_out, bundle)
        else:
            some_x = _pack(x, bundle)
        # of the weight, the library reads shape and layout alone
        some_weight = weight.narrow(dim, 0, live)
        small = _library(some_grad, some_x, some_weight, *shape, transposed, output_padding, some_groups)
        spread(small, out, bundle, dim)
    return out


def _pack(image: Tensor, runs: Sequence[Run]) -> Tensor:
    parts = slices(image, runs, 1)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def has_tiles(grad_out: Tensor, x: Tensor, dim: int, *conv: Any) -> bool:
    """Whether a Triton kernel computes this gradient."""
    *_, transposed, _, _ = conv
    return grad_out.dtype in KERNEL_DTYPES and x.dim() <= 4 and not transposed and dim == 0


def convolve_tiles(
    grad_out: Tensor, x: Tensor, weight: Tensor, flags: Tensor, first_flag: int, block: int, dim: int, *conv: Any
) -> Tensor:
    """The gradient by a Triton kernel, which reads the flags on the device: that of products for 1x1 convolutions."""
    strides = _promised(grad_out, x, weight, *conv)
    stride, padding, dilation, _, _, groups = conv
    if groups == 1 and {*weight.shape[2:], *stride} == {1} and not any(padding):
        dy, pixels = _pixels(grad_out), _pixels(x)
        if dy is not None and pixels is not None:
            from .triton_matmul import masked_matmul  # here, because torch for CPUs comes without triton

            dw = masked_matmul(dy.t()[None], pixels[None], flags, (0, first_flag, 0), (0, block, 0))
            return dw.as_strided(weight.shape, strides)  # all layouts of 1x1 filters are the same memory
    from .triton_conv import write_conv_dw

    out = grad_out.new_empty_strided(weight.shape, strides)
    write_conv_dw(out, grad_out, x, flags, first_flag, block, stride, padding, dilation, groups)
    return out


def _pixels(image: Tensor) -> Tensor | None:
    """A batch of images seen as one matrix [pixels, channels]; None where it is not one in memory (NCHW, N > 1)."""
    try:
        return image.movedim(1, -1).view(-1, image.shape[1])
    except RuntimeError:
        return None


_LIBRARY.impl("masked_conv_dw", _cpu, "CPU")
_LIBRARY.impl("masked_conv_dw", _cuda, "CUDA")
