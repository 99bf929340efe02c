"""A batched product: recognised, and masked along its own dimension."""

from __future__ import annotations

from tiny import (
    Tiny,
    aten,
    found,
    located,
    param,
    where,
)
from torch.testing import FileCheck

from cacompile.passes import group, locate, mark_products, mask_weight_grads
from cacompile.passes.plan import Plan


def test_heads_of_a_batched_product() -> None:
    tiny = Tiny()
    product = tiny.call(aten.bmm.default, tiny.input("a", 4, 16, 8), tiny.input("b", 4, 8, 32))
    grad = found(located(product))
    assert grad.kind == "batched" and where(grad.products[0]) == (0, 1, 0, 4)


def test_batched_product_is_masked_along_its_own_dimension() -> None:
    tiny = Tiny()
    dy, x = tiny.input("dy", 4, 8, 6), tiny.input("x", 4, 8, 5)
    dw = tiny.call(aten.bmm.default, tiny.call(aten.permute.default, dy, [0, 2, 1]), x)
    gm = tiny.returns(dw)
    plan = group(locate(Plan(params=(param(dw),))), block_rows=1)
    mark_products(plan)
    assert mask_weight_grads(gm, plan).masked == ("w",)
    call = "cacompile.masked_bmm.default(permute_default, x, convaware_flags, None, [0, 0, 0], [1, 0, 0])"
    FileCheck().check(call).run(gm.code)
