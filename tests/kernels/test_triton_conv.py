"""The Triton kernels of convolutions, in Triton's interpreter."""

from collections.abc import Sequence

import pytest
import torch
from interpreting import DESCRIPTORS, POINTERS, compare, make_flags, pretend


def conv_case(
    dtype: torch.dtype,
    image: tuple[int, ...],
    weight: tuple[int, ...],
    shape: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    layout: str,
    block: int,
    pattern: str,
    arch: str = POINTERS,
    programs: int = 4,
) -> None:
    from cacompile.kernels import masked_conv_dw_reference, triton_conv

    stride, padding, dilation, groups = shape
    conv = stride, padding, dilation, False, [0] * len(stride), groups
    with pretend(arch, programs):
        w, x = torch.randn(weight).to(dtype), torch.randn(image).to(dtype)
        grad_out = torch.randn_like(torch.ops.aten.convolution.default(x, w, None, *conv))
        if layout == "channels last":
            w, x, grad_out = (t.to(memory_format=torch.channels_last) for t in (w, x, grad_out))
        elif layout == "sliced":  # out of rooms full of NaN
            x, grad_out = (torch.full([n + 3 for n in t.shape], torch.nan, dtype=dtype)[
                tuple(slice(1, n + 1) for n in t.shape)].copy_(t) for t in (x, grad_out))  # fmt: skip
        flags, (first_flag,) = make_flags(weight[:1], (block,), pattern)
        operands = (t.double() for t in (grad_out, x, w))
        exact = masked_conv_dw_reference(*operands, flags, None, first_flag, block, 0, *conv)
        out = torch.empty_like(w)
        triton_conv.write_conv_dw(out, grad_out, x, flags, first_flag, block, stride, padding, dilation, groups)
        compare(out, exact, exact != 0)


CONVS = {  # images, weight, (stride, padding, dilation, groups)
    "3x2, stride and dilation": ((2, 5, 9, 7), (67, 5, 3, 2), ([2, 1], [1, 2], [1, 2], 1)),
    "3x3, many channels": ((2, 72, 6, 5), (40, 72, 3, 3), ([1, 1], [1, 1], [1, 1], 1)),
    "1x1": ((3, 20, 5, 5), (130, 20, 1, 1), ([2, 2], [0, 0], [1, 1], 1)),
    "1d": ((2, 6, 17), (33, 6, 4), ([2], [1], [2], 1)),
    "groups": ((2, 12, 6, 7), (30, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 3)),
    "depthwise": ((2, 18, 8, 8), (18, 1, 3, 3), ([1, 1], [1, 1], [1, 1], 18)),
    "depthwise 1d, two filters each": ((2, 9, 20), (18, 1, 5), ([1], [4], [1], 9)),
    "no images": ((0, 4, 5, 5), (8, 4, 3, 3), ([1, 1], [1, 1], [1, 1], 1)),
}


@pytest.mark.thin(2)
@pytest.mark.parametrize("layout", ("contiguous", "channels last", "sliced"))
@pytest.mark.parametrize("name", CONVS)
def test_conv(interpreter, name, layout):
    if layout == "channels last" and "1d" in name:
        pytest.skip("of images only")
    dtype = torch.float16 if layout == "sliced" else torch.float32
    interpreter(conv_case, dtype, *CONVS[name], layout, 15, "mixed")


@pytest.mark.thin(2)
@pytest.mark.parametrize("block", (1, 7, 10, 64))
def test_conv_blocks(interpreter, block, pattern):
    interpreter(conv_case, torch.float16, *CONVS["groups"], "contiguous", block, pattern)


@pytest.mark.parametrize("programs", (1, 7))
@pytest.mark.parametrize("arch", (POINTERS, DESCRIPTORS))
def test_conv_cut_tiles(interpreter, arch, programs):
    case = (9, 8, 16, 17), (200, 8, 3, 3), ([1, 1], [1, 1], [1, 1], 1)
    interpreter(conv_case, torch.float16, *case, "channels last", 128, "mixed", arch, programs)


def mismatch_case() -> None:
    from cacompile.kernels import triton_conv, triton_matmul

    flags = torch.ones(8, dtype=torch.uint8)
    with pretend(POINTERS):
        with pytest.raises(ValueError, match="masked product"):
            triton_matmul.masked_matmul(torch.empty(1, 4, 5), torch.empty(1, 6, 4), flags, (0, 0, 0), (0, 1, 0))
        for first_flag, rows in ((0, 40), (5, 4)):
            with pytest.raises(IndexError, match="8 flags for"):
                a, b = torch.empty(1, rows, 5), torch.empty(1, 5, 4)
                triton_matmul.masked_matmul(a, b, flags, (0, first_flag, 0), (0, 1, 0))
        out, grad_out, x = torch.empty(4, 3, 1, 1), torch.empty(2, 4, 5, 5), torch.empty(2, 6, 5, 5)
        with pytest.raises(ValueError, match="weight gradient"):
            triton_conv.write_conv_dw(out, grad_out, x, flags, 0, 1, [1, 1], [0, 0], [1, 1])
        with pytest.raises(IndexError, match="8 flags for"):
            triton_conv.write_conv_dw(out, grad_out, x[:, :3], flags, 5, 1, [1, 1], [0, 0], [1, 1])


def test_mismatched_operands_are_refused_before_memory_is_touched(interpreter):
    interpreter(mismatch_case)
