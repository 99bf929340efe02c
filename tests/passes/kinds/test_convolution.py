"""A convolution: recognised, split in what is masked and what is not, and what verify says of a wrong split."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from tiny import (
    FLAGS,
    Tiny,
    aten,
    found,
    located,
    marked_conv,
    masked,
    node_of,
    on,
    reason,
)
from torch import fx
from torch.testing import FileCheck

from cacompile.kernels import masked_conv_dw
from cacompile.passes import Broken, mask_weight_grads, verify


def conv_grad(tiny: Tiny, *, transposed: bool = False, groups: int = 1) -> fx.Node:
    dy, x = tiny.input("dy", 2, 32, 8, 8), tiny.input("x", 2, 16, 8, 8)
    w = tiny.input("w", *((16, 32 // groups) if transposed else (32, 16 // groups)), 1, 1)
    conv = tiny.call(aten.convolution_backward.default, dy, x, w, None, [1, 1], [0, 0], [1, 1], transposed, [0, 0],
                     groups, [False, True, False])  # fmt: skip
    return tiny.call(operator.getitem, conv, 1)


def test_convolution() -> None:
    grad = found(located(conv_grad(Tiny())))
    assert (grad.kind, grad.dim, grad.unit) == ("convolution", 0, 1)
    assert grad.products[0].node.target is aten.convolution_backward.default
    assert grad.flops == 2 * 32 * 16 * 2 * 64


def test_grouped_convolution_is_cut_between_its_groups() -> None:
    assert found(located(conv_grad(Tiny(), groups=4))).unit == 8


def test_transposed_convolution_has_its_filters_along_dimension_one() -> None:
    assert found(located(conv_grad(Tiny(), transposed=True))).dim == 1
    assert "transposed convolution with 2 groups" in reason(located(conv_grad(Tiny(), transposed=True, groups=2)))


def test_convolution_is_split() -> None:
    gm, plan = marked_conv()
    plan = mask_weight_grads(gm, plan)
    assert plan.masked == ("w",)
    FileCheck().check("convolution_backward.default").check("[True, False, False]").run(gm.code)
    FileCheck().check("cacompile.masked_conv_dw.default(dy, x, w, convaware_flags, None, 0, 16, 0").run(gm.code)

    args = torch.randn(2, 32, 6, 6), torch.randn(2, 4, 8, 8), torch.randn(32, 4, 3, 3)
    settings = [32], [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, True]
    dx, dw, db = aten.convolution_backward.default(*args, *settings)
    new_dw, new_dx, new_db = gm(*args, FLAGS)
    torch.testing.assert_close(new_dw[on(32)], dw[on(32)])
    torch.testing.assert_close(new_db, db)
    assert not new_dw[~on(32)].any() and torch.equal(new_dx, dx)


def test_convolution_without_data_gradient_goes() -> None:
    for bias in (True, False):
        gm, plan = marked_conv(needs_dx=False, bias=bias)
        assert mask_weight_grads(gm, plan).masked == ("w",)
        FileCheck().check_not("convolution_backward").check("masked_conv_dw").run(gm.code)


def conv_keeps_dw(gm: fx.GraphModule) -> None:
    conv = node_of(gm, aten.convolution_backward.default)
    conv.args = (*conv.args[:-1], [True, True, False])


def conv_other_stride(gm: fx.GraphModule) -> None:
    node_of(gm, masked_conv_dw).update_arg(8, [2, 2])


def bias_over_channels(gm: fx.GraphModule) -> None:
    node_of(gm, aten.sum.dim_IntList).update_arg(1, [0, 1, 2])


@pytest.mark.parametrize("break_it", [conv_keeps_dw, conv_other_stride, bias_over_channels])
def test_broken_convolution(break_it: Callable[[fx.GraphModule], None]) -> None:
    before, gm = masked(marked_conv)
    break_it(gm)
    with pytest.raises(Broken):
        verify(before, gm.graph, ("w",))
