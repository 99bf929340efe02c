"""A product of two matrices: recognised, and masked by rows."""

from __future__ import annotations

import torch
from tiny import (
    FLAGS,
    Tiny,
    copied,
    found,
    located,
    marked_mm,
    on,
    where,
)
from torch.testing import FileCheck

from cacompile.passes import mask_weight_grads


def test_product_itself() -> None:
    tiny = Tiny()
    dw = tiny.mm(tiny.input("dy_t", 48, 8), tiny.input("x", 8, 32))
    grad = found(located(dw))
    [product] = grad.products
    assert (product.node, product.kind, where(product)) == (dw, "linear", (0, 1, 0, 48))
    assert grad.kind == "linear" and grad.dim == 0 and grad.flops == 2 * 48 * 8 * 32


def test_matmul_gradient_becomes_masked() -> None:
    gm, plan = marked_mm()
    before = copied(gm)
    plan = mask_weight_grads(gm, plan)
    assert plan.masked == ("w",) and plan.dense == ()
    masked = "cacompile.masked_mm.default(permute_default, x, convaware_flags, None, [0, 0], [16, 0])"
    FileCheck().check(masked).check("aten.mm.default(dy, w)").run(gm.code)
    assert len(gm.graph.nodes) == len(before.nodes) + 1

    dy, x, w = torch.randn(8, 64), torch.randn(8, 32), torch.randn(64, 32)
    dw, dx = gm(dy, x, w, FLAGS)
    torch.testing.assert_close(dw[on(64)], (dy.t() @ x)[on(64)])
    assert not dw[~on(64)].any() and torch.equal(dx, dy @ w)
    dw, dx = gm(dy, x, w, torch.ones_like(FLAGS))
    assert torch.equal(dw, dy.t() @ x) and torch.equal(dx, dy @ w)
