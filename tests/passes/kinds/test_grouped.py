"""A grouped product: recognised, and masked by experts, rows or columns."""

from __future__ import annotations

import pytest
import torch
from tiny import (
    Tiny,
    aten,
    by_hand,
    copied,
    found,
    located,
    reason,
    where,
)
from torch.testing import FileCheck

from cacompile.passes import mask_weight_grads, verify


@pytest.mark.parametrize("order", [[0, 1, 2], [0, 2, 1]])
def test_experts_of_a_grouped_product(order: list[int]) -> None:
    tiny = Tiny()
    a, b = tiny.input("dy_t", 48, 64, dtype=torch.bfloat16), tiny.input("x", 64, 32, dtype=torch.bfloat16)
    product = tiny.graph.call_function(aten._grouped_mm.default, (a, b, tiny.input("offs", 4, dtype=torch.int32)))
    product.meta["val"] = torch.empty(4, 48, 32, dtype=torch.bfloat16, device="meta")
    grad = found(located(tiny.call(aten.permute.default, product, order)))
    assert [(g.dim, where(g.products[0])[0]) for g in (grad, *grad.others)] == list(enumerate(order))
    assert grad.kind == "grouped" and grad.flops == 2 * 48 * 32 * 64


def test_grouped_product_of_tokens_makes_no_weight_gradient() -> None:
    tiny = Tiny()
    dy, w = tiny.input("dy", 64, 48), tiny.input("w", 4, 48, 32)
    product = tiny.graph.call_function(aten._grouped_mm.default, (dy, w, tiny.input("offs", 4, dtype=torch.int32)))
    product.meta["val"] = torch.empty(64, 32, device="meta")
    plan = located(product)
    assert "_grouped_mm" in reason(plan) and plan.dense[0].kind == "other"


def test_grouped_product_is_masked() -> None:
    tiny = Tiny()
    a, b = tiny.input("dy_t", 16, 24), tiny.input("x", 24, 8)
    offs = tiny.input("offs", 4, dtype=torch.int32)
    dw = tiny.graph.call_function(aten._grouped_mm.default, (a, b, offs))
    dw.meta["val"] = torch.empty(4, 16, 8, device="meta")
    gm, plan = by_hand(tiny, dw, 1)
    before = copied(gm)
    verify(before, gm.graph, ())
    plan = mask_weight_grads(gm, plan)
    assert plan.masked == ("w",)
    call = "cacompile.masked_grouped_mm.default(dy_t, x, offs, convaware_flags, None, [0, 3, 0], [0, 2, 0])"
    FileCheck().check(call).run(gm.code)
    verify(before, gm.graph, plan.masked)
