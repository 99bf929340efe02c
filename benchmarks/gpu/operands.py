"""The operands of one shape, and its weight gradient in every way: the library's, ours by device flags and by host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cacompile.kernels  # noqa: F401  registers the operations
from benchmarks.gpu.shapes import Conv, Product, Shape, draw_flags

ours = torch.ops.cacompile


class Flags:
    """One mask of a shape on the device and on the host."""

    def __init__(self, shape: Shape, counts: tuple[int, ...], seed: int, device: str) -> None:
        values, first_flags = draw_flags(shape, counts, seed)
        self.host = torch.tensor(values, dtype=torch.uint8, device="cpu")
        self.device = self.host.to(device)
        self.first_flags = [first_flags.get(dim, 0) for dim in range(3)]


class Operands:
    """Random operands as a training step has them, laid out as Inductor hands them over: dy^T is a view of dy."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.shape = shape
        if isinstance(shape, Product):
            e, (_, m, n), k = shape.batch, shape.sizes, shape.k
            self.dy = torch.randn(e, k, m, dtype=dtype, device=device)
            self.x = torch.randn(e, k, n, dtype=dtype, device=device)
            if e == 1:
                self.dy, self.x = self.dy[0], self.x[0]
        else:
            layout = {"dtype": dtype, "device": device, "memory_format": torch.channels_last}
            images = (shape.batch, shape.channels, shape.side, shape.side)
            self.x = torch.empty(images, **layout).normal_()
            self.dy = torch.empty((shape.batch, shape.filters, shape.out_side, shape.out_side), **layout).normal_()
            taps = (shape.filters, shape.channels, shape.kernel, shape.kernel)
            self.weight = torch.empty(taps, **layout).normal_()

    def library(self) -> Tensor:
        """All of dW, by cuBLAS or cuDNN."""
        if isinstance(self.shape, Conv):
            return torch.ops.aten.convolution_backward(
                self.dy, self.x, self.weight, None, *self._conv(), (False, True, False)
            )[1]
        product: Callable[..., Tensor] = torch.mm if self.shape.batch == 1 else torch.bmm
        return product(self.dy.mT, self.x)

    def masked(self, flags: Flags, host: bool) -> Tensor:
        """Our operation; host: the host may look at the flags and choose how to compute."""
        seen = flags.host if host else None
        if isinstance(self.shape, Conv):
            where = flags.first_flags[0], self.shape.block, 0
            return ours.masked_conv_dw(self.dy, self.x, self.weight, flags.device, seen, *where, *self._conv())
        first_flags, blocks = flags.first_flags, list(self.shape.blocks)
        if self.shape.batch == 1:
            return ours.masked_mm(self.dy.mT, self.x, flags.device, seen, first_flags[1:], blocks[1:])
        return ours.masked_bmm(self.dy.mT, self.x, flags.device, seen, first_flags, blocks)

    def tiles(self, flags: Flags) -> Tensor:
        """The Triton kernel as it is launched for device flags; on a CPU, by Triton's interpreter."""
        if self.dy.is_cuda:
            return self.masked(flags, host=False)
        if isinstance(self.shape, Conv):
            from cacompile.kernels.masked_conv import convolve_tiles

            where = flags.first_flags[0], self.shape.block, 0
            return convolve_tiles(self.dy, self.x, self.weight, flags.device, *where, *self._conv())
        from cacompile.kernels.triton_matmul import masked_matmul

        a, b = (t if t.dim() == 3 else t[None] for t in (self.dy.mT, self.x))
        dw = masked_matmul(a, b, flags.device, flags.first_flags, self.shape.blocks)
        return dw if self.shape.batch > 1 else dw[0]

    def exact(self, large: bool = False) -> Tensor:
        """All of dW in float64, by the CPU; large: by the GPU, convolutions in float32, which alone is quick there."""
        dtype = torch.float32 if large and isinstance(self.shape, Conv) else torch.float64
        wide = Operands.__new__(Operands)
        wide.shape = self.shape
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(wide, name, value.to(value.device if large else "cpu", dtype))
        return wide.library().to(self.dy.device)

    def _conv(self) -> tuple[Any, ...]:
        assert isinstance(self.shape, Conv)
        stride, padding = [self.shape.stride] * 2, [self.shape.padding] * 2
        return stride, padding, [1, 1], False, [0, 0], 1


def is_on(dw: Tensor, shape: Shape, flags: Flags) -> Tensor:
    """Ones where dw is to be computed, zeros elsewhere, broadcastable to dw."""
    if isinstance(shape, Conv):
        dims = {0: (0, shape.filters, shape.block)}
    else:
        first = 0 if shape.batch > 1 else 1
        dims = {i - first: (i, size, block) for i, (size, block) in enumerate(zip(shape.sizes, shape.blocks)) if block}
    on = torch.ones([1] * dw.dim(), dtype=dw.dtype, device=dw.device)
    for dim, (axis, size, block) in dims.items():
        index = flags.first_flags[axis] + torch.arange(size, device=dw.device) // block
        each = (flags.device[index] != 0).to(dw.dtype)
        on = on * each.view([-1 if i == dim else 1 for i in range(dw.dim())])
    return on
