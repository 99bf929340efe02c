"""The choice by host flags, tried on CPU tensors: what runs on a GPU, up to the products themselves."""

import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from masking import FIRST_FLAG, along

from cacompile.kernels import dispatch, masked_bmm_reference, masked_conv_dw_reference, masked_mm_reference
from cacompile.kernels.blocks import readable
from cacompile.kernels.dispatch import DEFAULT, Choice, Row, choose

CPU = torch.device("cpu")
INF = float("inf")
CONV = [1, 1], [1, 1], [1, 1], False, [0, 0], 1


def on_gpu(name: str) -> Callable[..., Any]:
    """The CUDA implementation of an operation, which takes tensors of any device."""
    return sys.modules[f"cacompile.kernels.{name}"]._cuda


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Row]]:
    """A table of the test's own, empty at first."""
    table: list[Row] = []
    monkeypatch.setattr(dispatch, "table", lambda: tuple(table))
    choose.cache_clear()
    yield table
    choose.cache_clear()
    dispatch.describe.cache_clear()
    dispatch._report_unmeasured.cache_clear()


class Tiles(Exception):
    """The Triton kernel was asked for."""


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of the Triton kernels something that tells."""
    launch = mock.Mock(side_effect=Tiles)
    for name, functions in {
        "triton_matmul": ("masked_matmul",),
        "triton_conv": ("write_conv_dw",),
    }.items():
        monkeypatch.setitem(sys.modules, f"cacompile.kernels.{name}", mock.Mock(**dict.fromkeys(functions, launch)))


def mm_call(each: list[int], host: bool, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Operands [12, 6] x [6, 8] masked in 4 blocks of 3 rows."""
    flags = torch.tensor([0] * FIRST_FLAG + each, dtype=torch.uint8)
    a, b = torch.randn(12, 6).to(dtype), torch.randn(6, 8).to(dtype)
    return a, b, flags, flags.clone() if host else None, *along(0, 3, 2)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("choice", (Choice(0, 0), Choice(INF, 0)))
@pytest.mark.parametrize("each", ([1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]))
def test_library_ways_give_what_the_reference_gives(rows, choice, each):
    rows += [Row("cpu", "", op, 4, (1, 1, 1), choice) for op in ("mm", "bmm", "conv")]
    args = mm_call(each, host=True)
    out = on_gpu("masked_mm")(*args)
    torch.testing.assert_close(out, masked_mm_reference(*args))
    if all(each):
        assert torch.equal(out, args[0] @ args[1])
    a, b, flags, host, *_ = args
    batched = a.view(4, 3, 6), b.expand(4, 6, 8), flags, host
    for dim, block in ((0, 1), (1, 1), (2, 2)):
        masked = along(dim, block, 3)
        if dim == 1:
            masked = [0, FIRST_FLAG + 1, 0], [0, 1, 0]
        torch.testing.assert_close(on_gpu("masked_bmm")(*batched, *masked), masked_bmm_reference(*batched, *masked))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("each", ([1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]))
@pytest.mark.parametrize("long_run", (0, INF))
@pytest.mark.parametrize("groups", (1, 4))
def test_library_ways_of_a_convolution(rows, each, long_run, groups):
    rows.append(Row("cpu", "", "conv", 4, (1, 1, 1), Choice(long_run, 0)))
    flags = torch.tensor([0] * FIRST_FLAG + each, dtype=torch.uint8)
    x, weight = torch.randn(2, 8, 5, 5), torch.randn(12, 8 // groups, 3, 3)
    args = torch.randn(2, 12, 5, 5), x, weight, flags, flags.clone(), FIRST_FLAG, 3, 0, *CONV[:-1], groups
    torch.testing.assert_close(on_gpu("masked_conv")(*args), masked_conv_dw_reference(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    "below, each, tiled", ((0.5, [1, 0, 0, 0], True), (0.5, [1, 1, 0, 0], False), (1, [1, 1, 1, 0], True))
)
def test_tiles_below_their_share(rows, below, each, tiled):
    rows.append(Row("cpu", "", "mm", 4, (1, 1, 1), Choice(INF, below)))
    with pytest.raises(Tiles) if tiled else mock.MagicMock():
        on_gpu("masked_mm")(*mm_call(each, host=True))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("each", ([1, 1, 1, 1], [0, 0, 0, 0]))
def test_without_host_flags_it_is_always_tiles(rows, each):
    with pytest.raises(Tiles):
        on_gpu("masked_mm")(*mm_call(each, host=False))


@pytest.mark.usefixtures("tiles")
def test_during_capture_the_host_is_not_asked(rows, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    operand, flags = mock.Mock(is_cuda=True), torch.ones(1, dtype=torch.uint8)
    assert not readable(flags, operand)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert readable(flags, operand) and not readable(None, operand)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("host", (True, False))
def test_float64_never_asks_for_tiles(rows, host):
    rows.append(Row("cpu", "", "mm", 8, (1, 1, 1), Choice(INF, 1)))
    args = mm_call([1, 0, 0, 1], host, torch.float64)
    torch.testing.assert_close(on_gpu("masked_mm")(*args), masked_mm_reference(*args))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    "what, reference",
    (("3d", True), ("transposed", True), ("input channels", True), ("2d", False), ("grouped", False)),
)
def test_convolutions_without_host_flags(rows, what, reference):
    n = 3 if what == "3d" else 2
    groups = 2 if what == "grouped" else 1
    transposed = what == "transposed"
    conv = [1] * n, [1] * n, [1] * n, transposed, [0] * n, groups
    x, weight = torch.randn(2, 4, *[5] * n), torch.randn(4, 4 // groups, *[3] * n)
    flags = torch.tensor([0] * FIRST_FLAG + [1, 0], dtype=torch.uint8)
    dim = 1 if what in ("transposed", "input channels") else 0
    args = torch.randn(2, 4, *[5] * n), x, weight, flags, None, FIRST_FLAG, 2, dim, *conv
    if reference:
        assert torch.equal(on_gpu("masked_conv")(*args), masked_conv_dw_reference(*args))
    else:
        with pytest.raises(Tiles):
            on_gpu("masked_conv")(*args)


@pytest.mark.parametrize("batch, last, matrix", ((3, True, True), (1, False, True), (1, True, True), (3, False, False)))
def test_pointwise_convolutions_are_products_where_pixels_are_rows(rows, monkeypatch, batch, last, matrix):
    calls = []

    def masked_matmul(a, b, flags, first_flags, blocks):
        calls.append("mm")
        return masked_bmm_reference(a, b, flags, None, first_flags, blocks)

    def write_conv_dw(out, grad_out, x, flags, first_flag, block, stride, padding, dilation, groups):
        calls.append("conv")
        out.copy_(
            masked_conv_dw_reference(
                grad_out, x, out, flags, None, first_flag, block, 0, stride, padding, dilation, False, [0, 0], groups
            )
        )

    monkeypatch.setitem(sys.modules, "cacompile.kernels.triton_matmul", mock.Mock(masked_matmul=masked_matmul))
    monkeypatch.setitem(sys.modules, "cacompile.kernels.triton_conv", mock.Mock(write_conv_dw=write_conv_dw))
    layout = torch.channels_last if last else torch.contiguous_format
    grad_out, x, weight = (
        torch.randn(*shape).to(memory_format=layout) for shape in ((batch, 6, 5, 4), (batch, 3, 5, 4), (6, 3, 1, 1))
    )
    flags = torch.tensor([0] * FIRST_FLAG + [1, 0, 1], dtype=torch.uint8)
    args = grad_out, x, weight, flags, None, FIRST_FLAG, 2, 0, [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    out, expected = on_gpu("masked_conv")(*args), masked_conv_dw_reference(*args)
    torch.testing.assert_close(out, expected)
    assert out.stride() == expected.stride() and calls == ["mm" if matrix else "conv"]


def test_nearest_shape_of_the_device_itself(rows):
    near, far, other = Choice(1, 0), Choice(2, 0), Choice(3, 0)
    rows += [
        Row("cpu", "", "mm", 4, (1024, 1024, 1024), near),
        Row("cpu", "", "mm", 4, (64, 64, 64), far),
        Row("cpu", "", "bmm", 4, (512, 512, 512), other),
        Row("cpu", "", "mm", 2, (512, 512, 512), other),
    ]
    assert choose(CPU, "mm", torch.float32, 512, 700, 400) == near
    assert choose(CPU, "mm", torch.float32, 0, 8, 200) == far
    assert choose(CPU, "mm", torch.float16, 1, 1, 1) == other, "float16 is taken for bfloat16"
    assert choose(CPU, "mm", torch.float64, 512, 512, 512) == DEFAULT


def test_a_gpu_that_nobody_measured(rows, monkeypatch, caplog):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    dispatch.describe.cache_clear()
    with caplog.at_level(logging.INFO, logger="cacompile.kernels.dispatch"):
        assert choose(gpu, "mm", torch.float32, 8, 8, 8) == DEFAULT
        assert choose(gpu, "mm", torch.float32, 9, 9, 9) == DEFAULT
    assert len(caplog.records) == 1 and "benchmarks.kernels.tune" in caplog.text
    choose.cache_clear()
    rows.append(Row("A100", "8.0", "mm", 4, (8, 8, 8), Choice(1, 1)))
    assert choose(gpu, "mm", torch.float32, 8, 8, 8) == DEFAULT
    choose.cache_clear()
    rows.append(Row("H100", "9.0", "mm", 4, (8, 8, 8), Choice(7, 0.5)))
    assert choose(gpu, "mm", torch.float32, 8, 8, 8) == Choice(7, 0.5), "one of its family"
    choose.cache_clear()
    rows.append(Row("H200", "9.0", "mm", 4, (800, 800, 800), Choice(9, 0.25)))
    assert choose(gpu, "mm", torch.float32, 8, 8, 8) == Choice(9, 0.25), "itself, whatever the shape"


def test_the_table_that_comes_with_the_package():
    table = dispatch.table()
    assert {row.op for row in table if row.device == "cpu"} == {"mm", "bmm", "conv"}
    for row in table:
        assert row.choice.long_run >= 0 and 0 <= row.choice.tiles_below <= 1
        assert row.device != "cpu" or row.choice.tiles_below == 0, "there are no tiles on a CPU"
