from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from masking import FIRST_FLAG, along
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cacompile.kernels import masked_conv_dw, masked_conv_dw_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Conv:
    """One convolution, and along which weight dim and in which blocks its gradient is masked."""

    image: tuple[int, ...]
    c_in: int
    c_out: int
    kernel: tuple[int, ...]
    block: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    transposed: bool = False
    output_padding: int = 0
    groups: int = 1
    dim: int = 0

    def arguments(self) -> tuple[Any, ...]:
        n = len(self.image)
        each = ([value] * n for value in (self.stride, self.padding, self.dilation, self.output_padding))
        stride, padding, dilation, output_padding = each
        return stride, padding, dilation, self.transposed, output_padding, self.groups

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.ops.aten.convolution.default(x, weight, None, *self.arguments())

    def operands(
        self,
        dtype: torch.dtype,
        layout: Callable[[Tensor], Tensor] = lambda t: t,
        *,
        batch: int = 3,
        device: str = "cpu",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(grad_out, x, weight)"""
        first, second = (self.c_in, self.c_out) if self.transposed else (self.c_out, self.c_in)
        x = layout(torch.randn(batch, self.c_in, *self.image).to(device, dtype))
        weight = layout(torch.randn(first, second // self.groups, *self.kernel).to(device, dtype))
        return layout(torch.randn_like(self.forward(x, weight))), x, weight

    def where(self) -> tuple[list[int], list[int]]:
        return along(self.dim, self.block, 2)

    def blocks(self, weight: Tensor) -> int:
        return -(-weight.shape[self.dim] // self.block)

    def masked(self, grad_out: Tensor, x: Tensor, weight: Tensor, flags: Tensor, op: Any = masked_conv_dw) -> Tensor:
        return op(grad_out, x, weight, flags, None, FIRST_FLAG, self.block, self.dim, *self.arguments())

    def exact(self, grad_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """By autograd, in float64."""
        weight = weight.detach().double().requires_grad_()
        return torch.autograd.grad(self.forward(x.double(), weight), weight, grad_out.double())[0]


CONVS = {
    "1d": Conv(image=(17,), c_in=5, c_out=12, kernel=(3,), block=2, stride=2, padding=1),
    "2d": Conv(image=(9, 7), c_in=5, c_out=13, kernel=(3, 2), block=2, padding=1),
    "2d strided": Conv(image=(9, 9), c_in=4, c_out=70, kernel=(3, 3), block=16, stride=2, padding=2, dilation=2),
    "pointwise": Conv(image=(5, 5), c_in=63, c_out=129, kernel=(1, 1), block=32),
    "one filter": Conv(image=(5, 5), c_in=1, c_out=1, kernel=(3, 3), block=8),
    "3d": Conv(image=(4, 5, 4), c_in=3, c_out=9, kernel=(2, 3, 2), block=2, padding=1),
    "grouped": Conv(image=(6, 6), c_in=8, c_out=20, kernel=(3, 3), block=5, groups=4),
    "grouped, blocks of two": Conv(image=(6, 6), c_in=10, c_out=20, kernel=(3, 3), block=8, groups=5),
    "depthwise": Conv(image=(6, 6), c_in=12, c_out=12, kernel=(3, 3), block=2, padding=1, groups=12),
    "grouped 1d": Conv(image=(15,), c_in=8, c_out=12, kernel=(3,), block=3, groups=4),
    "groups that a block cuts": Conv(image=(6, 6), c_in=8, c_out=20, kernel=(3, 3), block=2, groups=4),
    "transposed": Conv(
        image=(5, 6),
        c_in=4,
        c_out=10,
        kernel=(3, 3),
        block=2,
        stride=2,
        padding=1,
        transposed=True,
        output_padding=1,
        dim=1,
    ),
    "transposed 1d": Conv(image=(9,), c_in=4, c_out=10, kernel=(4,), block=3, stride=2, transposed=True, dim=1),
    "input channels": Conv(image=(6, 6), c_in=12, c_out=5, kernel=(3, 3), block=4, dim=1),
    "transposed, input channels": Conv(image=(5, 5), c_in=12, c_out=5, kernel=(3, 3), block=4, transposed=True, dim=0),
}


def channels_last(tensor: Tensor) -> Tensor:
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.dim(), torch.contiguous_format)
    return tensor.to(memory_format=last)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": channels_last,
    "sliced": lambda t: torch.cat([t, t], -1)[..., ::2],
}


@pytest.fixture(params=CONVS.values(), ids=CONVS)
def conv(request: pytest.FixtureRequest) -> Conv:
    return request.param


@pytest.mark.thin(3)
@pytest.mark.parametrize(
    "dtype, layout",
    [
        *((torch.float32, layout) for layout in LAYOUTS),
        (torch.bfloat16, "channels last"),
        (torch.float64, "contiguous"),
    ],
)
def test_matches_float64_where_on_and_is_zero_where_off(device, conv, dtype, layout, pattern, make_flags, check):
    grad_out, x, weight = conv.operands(dtype, LAYOUTS[layout], device=device)
    flags = make_flags(pattern, conv.blocks(weight))
    exact = conv.exact(grad_out, x, weight)
    out = conv.masked(grad_out, x, weight, flags)
    assert out.dtype == dtype
    check(out, exact, flags, *conv.where())
    check(conv.masked(grad_out, x, weight, flags, masked_conv_dw_reference), exact, flags, *conv.where())


@pytest.mark.thin(3)
@pytest.mark.parametrize("layout_x", ("contiguous", "channels last"))
@pytest.mark.parametrize("layout_weight", ("contiguous", "channels last"))
@pytest.mark.parametrize("batch", (3, 1, 0))
@pytest.mark.parametrize("which", ("on", "mixed"))
def test_has_the_strides_the_compiler_was_promised(device, conv, layout_x, layout_weight, batch, which, make_flags):
    grad_out, x, weight = conv.operands(torch.float32, batch=batch, device=device)
    x, weight = LAYOUTS[layout_x](x), LAYOUTS[layout_weight](weight)
    flags = make_flags(which, conv.blocks(weight))
    out = conv.masked(grad_out, x, weight, flags)
    fake_mode = FakeTensorMode()
    library = torch.ops.aten.convolution_backward.default
    fakes = [fake_mode.from_tensor(tensor) for tensor in (grad_out, x, weight)]
    promised = library(*fakes, None, *conv.arguments(), [False, True, False])[1]
    ours = conv.masked(*fakes, fake_mode.from_tensor(flags))
    assert out.shape == promised.shape == ours.shape
    assert out.stride() == promised.stride() == ours.stride()
    assert batch or torch.equal(out, torch.zeros_like(weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_on_is_bit_for_bit_the_library(conv, dtype, layout):
    grad_out, x, weight = conv.operands(dtype, LAYOUTS[layout])
    library = torch.ops.aten.convolution_backward.default
    expected = library(grad_out, x, weight, None, *conv.arguments(), [False, True, False])[1]
    assert torch.equal(conv.masked(grad_out, x, weight, torch.ones(99, dtype=torch.uint8)), expected)


def test_a_backward_under_autocast_keeps_its_dtype(conv, pattern, make_flags):
    grad_out, x, weight = conv.operands(torch.float32)
    flags = make_flags(pattern, conv.blocks(weight))
    expected = conv.masked(grad_out, x, weight, flags, masked_conv_dw_reference)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = conv.masked(grad_out, x, weight, flags)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name, channels", (("2d", 8), ("grouped", 15), ("transposed", 6), ("depthwise", 8)))
def test_only_live_channels_reach_the_library(name, channels, make_flags):
    conv = CONVS[name]
    grad_out, x, weight = conv.operands(torch.float32)
    flags = torch.tensor([0] * FIRST_FLAG + [1, 0, 1, 1, 0, 1, 0], dtype=torch.uint8)
    with torch.profiler.profile(record_shapes=True) as profile:
        conv.masked(grad_out, x, weight, flags)
    calls = [event for event in profile.events() if event.name == "aten::convolution_backward"]
    assert [call.input_shapes[0][1] for call in calls] == [channels]


def test_off_blocks_stay_zero_beside_nan(device, conv, make_flags, check):
    operands = [torch.full_like(tensor, float("nan")) for tensor in conv.operands(torch.float32, device=device)]
    flags = make_flags("off", conv.blocks(operands[2]))
    assert not conv.masked(*operands, flags).any()


@pytest.mark.parametrize("name", ("1d", "grouped", "transposed", "3d"))
def test_opcheck(device, name, make_flags):
    conv = CONVS[name]
    grad_out, x, weight = conv.operands(torch.float32, channels_last, device=device)
    flags = make_flags("mixed", conv.blocks(weight))
    torch.library.opcheck(
        masked_conv_dw, (grad_out, x, weight, flags, None, FIRST_FLAG, conv.block, conv.dim, *conv.arguments())
    )


@pytest.mark.parametrize(
    "name, layout",
    (("1d", "contiguous"), ("2d", "channels last"), ("grouped", "contiguous"), ("transposed", "channels last")),
)
def test_compiled_once_for_any_batch(device, name, layout, make_flags):
    conv = CONVS[name]
    compiled = torch.compile(conv.masked, dynamic=None)
    for i, batch in enumerate((3, 5, 8)):
        grad_out, x, weight = conv.operands(torch.float32, LAYOUTS[layout], batch=batch, device=device)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        flags = make_flags("mixed", conv.blocks(weight))
        with torch.compiler.set_stance("fail_on_recompile" if i > 1 else "default"):
            out = compiled(grad_out, x, weight, flags)
        expected = conv.masked(grad_out, x, weight, flags)
        torch.testing.assert_close(out, expected)
        assert out.stride() == expected.stride()


def test_is_what_training_a_convolution_needs(device, make_flags, check):
    conv = CONVS["2d"]
    grad_out, x, weight = conv.operands(torch.float32, device=device)
    weight.requires_grad_()
    F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation).backward(grad_out)
    flags = make_flags("mixed", conv.blocks(weight))
    check(conv.masked(grad_out, x, weight, flags).detach(), weight.grad.double(), flags, *conv.where())
