"""The kernel that explain names is the one that runs."""

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from cacompile.explanation import chosen
from cacompile.kernels import dispatch, masked_bmm, masked_conv_dw, masked_mm
from cacompile.kernels.dispatch import Choice


def node(target, *shapes, arguments, host=None, device="cpu", dtype=torch.float32) -> fx.Node:
    """A masked operation on fake operands."""
    graph = fx.Graph()
    with FakeTensorMode():
        operands = [graph.placeholder(f"x{i}") for i in range(len(shapes))]
        for operand, shape in zip(operands, shapes):
            operand.meta["val"] = torch.empty(shape, dtype=dtype, device=device)
        values = [operand.meta["val"] for operand in operands]
        result = {masked_mm: torch.mm, masked_bmm: torch.bmm, masked_conv_dw: lambda dy, x, w: w}[target](*values)
    new = graph.call_function(target, (*operands, None, host, *arguments))
    new.meta["val"] = result
    return new


@pytest.mark.parametrize("size", [512, 1024])
@pytest.mark.parametrize("length", [64, 128])
def test_library_products_are_as_many_as_it_says(size, length):
    """Two runs of `length` rows are on."""
    a, b = torch.randn(size, 1024), torch.randn(1024, size)
    flags = torch.zeros(size // 64, dtype=torch.uint8)
    flags[: length // 64] = flags[256 // 64 : (256 + length) // 64] = 1
    calls = []

    def product(*operands, **settings):
        calls.append(operands)
        return torch.mm(*operands, **settings)

    dispatch.by_library(product, a, b, flags, (0, 0), (64, 0))
    said = chosen.kernel(node(masked_mm, a.shape, b.shape, arguments=([0, 0], [64, 0])))
    assert {512: "slices, or packed where runs are shorter than 128 rows", 1024: "packed"}[size] == said
    assert len(calls) == (2 if size == 512 and length >= 128 else 1)


CONV = ([1, 1], [1, 1], [1, 1], False, [0, 0])


@pytest.mark.parametrize(
    ("target", "shapes", "arguments", "settings", "choice", "words"),
    [
        (masked_mm, [(256, 64), (64, 128)], ([0, 0], [64, 0]), {}, Choice(64, 0), "slices"),
        (masked_mm, [(256, 64), (64, 128)], ([0, 0], [64, 0]), {}, Choice(float("inf"), 0), "packed"),
        (masked_conv_dw, [(2, 8, 4, 4), (2, 8, 4, 4), (8, 1, 3, 3)], (0, 4, 0, *CONV, 8), {}, Choice(1, 0), "slices"),
        (
            masked_conv_dw,
            [(2, 8, 4, 4), (2, 8, 4, 4), (8, 4, 3, 3)],
            (0, 2, 0, *CONV, 2),
            {},
            Choice(1, 0),
            "the whole convolution_backward, then zeros where blocks are off",
        ),
        (
            masked_mm,
            [(4096, 512), (512, 4096)],
            ([0, 0], [128, 0]),
            {"device": "cuda", "dtype": torch.bfloat16},
            Choice(1, 0),
            "Triton kernel, tiles of 128 x 256 x 64, 8 warps, 4 stages, flags read on the device",
        ),
        (
            masked_bmm,
            [(8, 1024, 256), (8, 256, 1024)],
            ([0, 0, 0], [1, 0, 0]),
            {"device": "cuda", "dtype": torch.bfloat16, "host": "given"},
            Choice(float("inf"), 0.5),
            "Triton kernel, tiles of 128 x 256 x 64, 8 warps, 4 stages below 50% on, else packed",
        ),
        (
            masked_mm,
            [(64, 64), (64, 64)],
            ([0, 0], [16, 0]),
            {"device": "cuda", "dtype": torch.float64},
            Choice(1, 0),
            "the whole mm, then zeros where blocks are off",
        ),
    ],
)
def test_every_way_is_named(monkeypatch, target, shapes, arguments, settings, choice, words):
    if "Triton" in words:
        pytest.importorskip("triton", exc_type=ImportError)
    monkeypatch.setattr(chosen, "choose", lambda *_: choice)
    monkeypatch.setattr(chosen, "_architecture", lambda *_: "sm_90")
    assert chosen.kernel(node(target, *shapes, arguments=arguments, **settings)) == words
