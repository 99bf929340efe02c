"""The experts of transformers 5: recognised, split, and what verify says of a wrong split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from experts import experts_backward
from tiny import (
    Tiny,
    by_hand,
    copied,
    found,
    located,
    masked,
    node_of,
    param,
    reason,
)
from torch import fx

from cacompile.kernels import masked_grouped_mm
from cacompile.passes import Broken, locate, mark_products, mask_weight_grads, verify
from cacompile.passes.plan import Plan


@pytest.mark.parametrize("index", [0, 1])
def test_experts_backward_of_transformers(index: int) -> None:
    grad = experts_backward(Tiny(), transposed=False)[index]
    if index == 0:
        assert "is output 0 of transformers" in reason(located(grad))
        return
    weight = found(located(grad))
    assert weight.kind == "grouped" and weight.flops == 2 * 24 * 12 * 16 and len(weight.others) == 2
    assert weight.products[0].node is grad.args[0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("needs_dx", [False, True])
def test_experts_backward_is_split(transposed: bool, dim: int, needs_dx: bool) -> None:
    tiny = Tiny()
    dx, dw = experts_backward(tiny, transposed=transposed)
    if not needs_dx:
        tiny.graph.erase_node(dx)
    gm, plan = by_hand(tiny, dw, dim, *([dx] if needs_dx else []))
    before = copied(gm)
    plan = mask_weight_grads(gm, plan)
    assert plan.masked == ("w",) and "fallback_backward" not in gm.code
    verify(before, gm.graph, plan.masked)

    weight = torch.randn(4, 16, 12).mT if transposed else torch.randn(4, 12, 16)
    args = [torch.randn(24, 12), torch.randn(24, 16), weight, torch.tensor([5, 5, 20, 24], dtype=torch.int32)]
    flags = torch.ones(3 + 8, dtype=torch.uint8)
    dense = fx.GraphModule({}, before)(*args)
    for ours, theirs in zip(gm(*args, flags), dense, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()
    flags[3] = 0  # the first two experts, rows or columns
    ours = gm(*args, flags)
    assert not ours[0].narrow(dim, 0, 2).any()
    rest = dense[0].shape[dim] - 2
    torch.testing.assert_close(ours[0].narrow(dim, 2, rest), dense[0].narrow(dim, 2, rest))
    assert all(map(torch.equal, ours[1:], dense[1:]))


def experts() -> tuple[fx.GraphModule, Plan]:
    tiny = Tiny()
    dx, dw = experts_backward(tiny, transposed=True)
    gm = tiny.returns(dw, dx)
    [grad] = locate(Plan(params=(param(dw),))).grads
    plan = Plan(grads=(replace(grad, block=1, others=()),))
    mark_products(plan)
    return gm, plan


def weight_not_turned(gm: fx.GraphModule) -> None:
    turned = node_of(gm, torch.ops.transformers.grouped_mm_fallback.default)
    turned.update_arg(1, gm.graph.find_nodes(op="placeholder")[2])


def tokens_of_others(gm: fx.GraphModule) -> None:
    forward = node_of(gm, torch.ops.transformers.grouped_mm_fallback.default)
    forward.update_arg(0, gm.graph.find_nodes(op="placeholder")[0])


def result_not_turned_back(gm: fx.GraphModule) -> None:
    [back] = node_of(gm, masked_grouped_mm).users
    back.update_arg(1, [0, 1, 2])


def columns_for_rows(gm: fx.GraphModule) -> None:
    node_of(gm, masked_grouped_mm).update_arg(6, [0, 1, 0])


def operands_exchanged(gm: fx.GraphModule) -> None:
    product = node_of(gm, masked_grouped_mm)
    product.args = (product.args[1], product.args[0], *product.args[2:])


BROKEN_EXPERTS = [weight_not_turned, tokens_of_others, result_not_turned_back, columns_for_rows, operands_exchanged]


@pytest.mark.parametrize("break_it", BROKEN_EXPERTS)
def test_broken_experts(break_it: Callable[[fx.GraphModule], None]) -> None:
    before, gm = masked(experts)
    verify(before, gm.graph, ("w",))
    break_it(gm)
    with pytest.raises(Broken):
        verify(before, gm.graph, ("w",))
