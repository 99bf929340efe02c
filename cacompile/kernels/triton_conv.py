"""The Triton side of masked_conv_dw: the weight gradient of a 1d or 2d convolution as one implicit matrix product.

Needs triton, which torch for CPUs comes without: imported at the first call with CUDA tensors.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_flags
from .triton_matmul import Tile, input_precision

TILE = Tile(64, 64, 64, 4)  # filters x (channels * kernel) x output pixels, for every shape: safe, not yet fast


@triton.jit(do_not_specialize=["flags"])  # where a slot starts is no reason to compile again
def masked_conv_dw_kernel(
    out, grad_out, x, flags,
    FILTERS, CHANNELS, PIXELS, block,
    H, W, OUT_H, OUT_W, KERNEL_H, KERNEL_W,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    out_f, out_c, out_h, out_w,
    grad_n, grad_f, grad_h, grad_w,
    x_n, x_c, x_h, x_w,
    INPUT_PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dw[f, (c, i, j)] = sum over (n, h, w) of grad_out[n, f, h, w] * x[n, c, h * stride + i * dilation - padding, ..].

    One program per tile of that matrix. Names such as `grad_n` are strides in elements; PIXELS is N * OUT_H * OUT_W.
    """
    tiles_n = tl.cdiv(CHANNELS * KERNEL_H * KERNEL_W, BLOCK_N)
    filters = tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M)
    taps = tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_filters = filters < FILTERS
    in_taps = taps < CHANNELS * KERNEL_H * KERNEL_W
    # 64 bits: a batch of activations may hold more than 2**31 elements
    filters64 = filters.to(tl.int64)
    channel = (taps // (KERNEL_H * KERNEL_W)).to(tl.int64)
    i = taps // KERNEL_W % KERNEL_H
    j = taps % KERNEL_W

    on = tl.load(flags + filters // block, mask=in_filters, other=0) != 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tl.max(on.to(tl.int32), 0) != 0:
        for start in range(0, PIXELS, BLOCK_K):
            pixels = start + tl.arange(0, BLOCK_K)
            in_pixels = pixels < PIXELS
            n = (pixels // (OUT_H * OUT_W)).to(tl.int64)
            h = pixels // OUT_W % OUT_H
            w = pixels % OUT_W
            at = n * grad_n + h.to(tl.int64) * grad_h + w.to(tl.int64) * grad_w
            g = tl.load(
                grad_out + filters64[:, None] * grad_f + at[None, :],
                mask=in_filters[:, None] & in_pixels[None, :],
                other=0.0,
            )
            y = (h * stride_h - padding_h)[:, None] + (i * dilation_h)[None, :]
            z = (w * stride_w - padding_w)[:, None] + (j * dilation_w)[None, :]
            inside = (y >= 0) & (y < H) & (z >= 0) & (z < W)
            v = tl.load(
                x + (n * x_n)[:, None] + (channel * x_c)[None, :] + y.to(tl.int64) * x_h + z.to(tl.int64) * x_w,
                mask=inside & in_pixels[:, None] & in_taps[None, :],
                other=0.0,
            )
            acc = tl.dot(g, v, acc, input_precision=INPUT_PRECISION)
    # always stored: an off filter reads as zeros, never as what was in memory, and never as NaN * 0
    acc = tl.where(on[:, None], acc, 0.0)
    target = out + filters64[:, None] * out_f + (channel * out_c + i * out_h + j * out_w)[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=in_filters[:, None] & in_taps[None, :])


def write_conv_dw(
    out: Tensor,
    grad_out: Tensor,
    x: Tensor,
    flags: Tensor,
    slot: int,
    block: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """Write all of `out`, a weight gradient with zeros in off blocks of filters; reads the flags on the device only.

    1d or 2d, one group, not transposed; float32, bfloat16 or float16, any strides; accumulates in float32.
    """
    if x.dim() == 3:  # one dimension is two, the first of them of size 1
        out, grad_out, x = out.unsqueeze(2), grad_out.unsqueeze(2), x.unsqueeze(2)
        stride, padding, dilation = (1, *stride), (0, *padding), (1, *dilation)
    (batch, _, out_h, out_w), (filters, channels, kernel_h, kernel_w) = grad_out.shape, out.shape
    if grad_out.dtype != x.dtype or x.shape[:2] != (batch, channels) or grad_out.shape[1] != filters:
        raise ValueError(f"weight gradient of {grad_out.dtype} {tuple(grad_out.shape)} and {x.dtype} {tuple(x.shape)}")
    flags = block_flags(flags, slot, block, filters)
    if out.numel() == 0:
        return
    grid = (triton.cdiv(filters, TILE.m) * triton.cdiv(channels * kernel_h * kernel_w, TILE.n),)
    with torch.cuda.device_of(x):
        masked_conv_dw_kernel[grid](
            out, grad_out, x, flags,
            filters, channels, batch * out_h * out_w, block,
            *x.shape[2:], out_h, out_w, kernel_h, kernel_w,
            *stride, *padding, *dilation,
            *out.stride(), *grad_out.stride(), *x.stride(),
            INPUT_PRECISION=input_precision(x.dtype, torch.backends.cudnn.conv.fp32_precision),
            **TILE.meta(x.dtype),
        )  # fmt: skip
