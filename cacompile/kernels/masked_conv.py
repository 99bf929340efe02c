"""`cacompile::masked_conv_dw`: the weight gradient of a convolution without the filters that are off this step.

_, dw, _ = convolution_backward(dy, x, w, ..., [False, True, False])  ->  dw = masked_conv_dw(dy, x, w, flags, ...)
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .blocks import KERNEL_DTYPES, Run, clear_gaps, live_runs, slices, spread, without_autocast, zero_off_blocks

_LIBRARY = torch.library.Library("cacompile", "FRAGMENT")
# the strides of the result follow those of the operands, so Inductor must keep them, as it does for the library's own
_LIBRARY.define(
    "masked_conv_dw(Tensor grad_out, Tensor x, Tensor weight, Tensor flags, int slot, int block, int dim,"
    " SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
masked_conv_dw = torch.ops.cacompile.masked_conv_dw.default
_convolution_backward = torch.ops.aten.convolution_backward.default


def _library(grad_out: Tensor, x: Tensor, weight: Tensor, *conv: Any) -> Tensor:
    """The weight gradient as PyTorch has it; `conv`: stride, padding, dilation, transposed, output_padding, groups."""
    return _convolution_backward(grad_out, x, weight, None, *conv, (False, True, False))[1]


def _promised(grad_out: Tensor, x: Tensor, weight: Tensor, *conv: Any) -> tuple[int, ...]:
    """The strides of the weight gradient that the compiler takes for granted: those of the library's fake."""
    operands = tuple((tuple(t.shape), t.stride(), t.dtype, t.device) for t in (grad_out, x, weight))
    return _promised_for(operands, tuple(tuple(c) if isinstance(c, list) else c for c in conv))


@lru_cache(
    maxsize=1024
)  # the rules for a convolution's memory format are torch's and many: ask it, 0.7 ms, once a shape
def _promised_for(operands: tuple[tuple[Any, ...], ...], conv: tuple[Any, ...]) -> tuple[int, ...]:
    with FakeTensorMode():
        fakes = (torch.empty_strided(*layout, dtype=dtype, device=device) for *layout, dtype, device in operands)
        return _library(*fakes, *conv).stride()


def _whole(grad_out: Tensor, x: Tensor, weight: Tensor, *conv: Any) -> Tensor:
    """The library's gradient, copied where its strides are not the promised ones (a batch of one or none)."""
    dw, strides = _library(grad_out, x, weight, *conv), _promised(grad_out, x, weight, *conv)
    return dw if dw.stride() == strides else dw.new_empty_strided(dw.shape, strides).copy_(dw)


def masked_conv_dw_reference(
    grad_out: Tensor, x: Tensor, weight: Tensor, flags: Tensor, slot: int, block: int, dim: int, *conv: Any
) -> Tensor:
    """The weight gradient with exact zeros where the block of an index of weight dim `dim` is off.

    Operands and `conv` (stride, padding, dilation, transposed, output_padding, groups) as for convolution_backward, in
    1, 2 or 3 dimensions; flags: 1-D uint8 on the same device. dim 0 of an ordinary and dim 1 of a transposed
    convolution are the output channels. The result has weight's shape and the strides convolution_backward would give.
    """
    return zero_off_blocks(_whole(grad_out, x, weight, *conv), flags, slot, block, dim)


@torch.library.register_fake("cacompile::masked_conv_dw", lib=_LIBRARY)
def _fake(
    grad_out: Tensor, x: Tensor, weight: Tensor, flags: Tensor, slot: int, block: int, dim: int, *conv: Any
) -> Tensor:
    return _library(grad_out, x, weight, *conv)


@without_autocast
def _cpu(
    grad_out: Tensor, x: Tensor, weight: Tensor, flags: Tensor, slot: int, block: int, dim: int, *conv: Any
) -> Tensor:
    size = weight.shape[dim]
    runs = live_runs(flags, slot, block, size)
    if runs == [(0, size)]:
        return _whole(grad_out, x, weight, *conv)  # all on: bit for bit what this op stands in for
    *_, transposed, _, groups = conv
    if groups > 1 and (transposed or dim != 0 or block % (size // groups)):
        return masked_conv_dw_reference(grad_out, x, weight, flags, slot, block, dim, *conv)  # groups cannot be cut
    return _convolve_runs(grad_out, x, weight, runs, dim, *conv)


@torch.no_grad()
def _convolve_runs(grad_out: Tensor, x: Tensor, weight: Tensor, runs: Sequence[Run], dim: int, *conv: Any) -> Tensor:
    """The gradient for the `runs` of weight dim `dim`, in one call on their channels put side by side; zeros elsewhere.

    At half density on 2 cores that takes 0.46 to 0.82 of the library's time where one call a run takes 0.47 to 1.08
    (medians of interleaved ratios; 16 to 256 channels, 8 blocks, 3x3 and 1x1, fp32 and bf16, channels last or not).
    """
    out = grad_out.new_empty_strided(weight.shape, _promised(grad_out, x, weight, *conv))
    clear_gaps(out, runs, dim)
    if not runs:
        return out
    *shape, transposed, output_padding, groups = conv
    live = sum(hi - lo for lo, hi in runs)
    if groups > 1:  # runs are whole groups: their inputs alone
        outputs, inputs = weight.shape[0] // groups, weight.shape[1]
        x = _pack(x, [(lo // outputs * inputs, hi // outputs * inputs) for lo, hi in runs])
        groups = live // outputs
    if (dim == 0) != transposed:
        grad_out = _pack(grad_out, runs)
    else:
        x = _pack(x, runs)
    # of the weight, the library reads shape and layout alone
    small = _library(grad_out, x, weight.narrow(dim, 0, live), *shape, transposed, output_padding, groups)
    spread(small, out, runs, dim)
    return out


def _pack(image: Tensor, runs: Sequence[Run]) -> Tensor:
    parts = slices(image, runs, 1)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _cuda(
    grad_out: Tensor, x: Tensor, weight: Tensor, flags: Tensor, slot: int, block: int, dim: int, *conv: Any
) -> Tensor:
    *_, transposed, _, groups = conv
    if grad_out.dtype not in KERNEL_DTYPES or x.dim() > 4 or transposed or groups != 1 or dim != 0:
        # no kernel of ours: correct and without a sync, but the off filters are computed and thrown away
        return masked_conv_dw_reference(grad_out, x, weight, flags, slot, block, dim, *conv)
    from .triton_conv import write_conv_dw  # here, because torch for CPUs comes without triton

    out = grad_out.new_empty_strided(weight.shape, _promised(grad_out, x, weight, *conv))
    write_conv_dw(out, grad_out, x, flags, slot, block, *conv[:3])
    return out


_LIBRARY.impl("masked_conv_dw", _cpu, "CPU")
_LIBRARY.impl("masked_conv_dw", _cuda, "CUDA")
