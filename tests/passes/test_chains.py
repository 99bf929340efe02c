"""chains: one product, several gradients: which of them are zero where the product is, and which are left alone."""

import operator
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import Tiny, aten, copied, param
from torch import fx
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, PlainAOTInput

from cacompile.passes import locate, mark_products, mask_weight_grads, verify
from cacompile.passes.plan import Plan, WeightGrad

Made = tuple[fx.GraphModule, Plan]


def planned(tiny: Tiny, *grads: fx.Node, others: tuple[fx.Node, ...] = ()) -> Made:
    """A graph that returns gradients of w0, w1, ... and then other things; its plan, in blocks of 16 rows."""
    gm = tiny.returns(*grads, *others)
    plan = locate(Plan(params=tuple(param(grad, name=f"w{i}", index=i) for i, grad in enumerate(grads))))
    first_flags = {g.param.name: 100 * i for i, g in enumerate(plan.grads)}
    plan = replace(
        plan, grads=tuple(replace(g, block=16, first_flag=first_flags[g.param.name], others=()) for g in plan.grads)
    )
    mark_products(plan)
    return gm, plan


def by_name(plan: Plan) -> dict[str, WeightGrad]:
    return {grad.param.name: grad for grad in plan.grads}


def scaled(
    tiny: Tiny, *, product: Callable[[fx.Node], fx.Node] = lambda dw: dw, dtype: torch.dtype = torch.float32
) -> tuple[fx.Node, fx.Node]:
    """Gradients of w [48, 32] and gain [48, 1], of which w * gain was used."""
    w, gain = tiny.input("w", 48, 32), tiny.input("gain", 48, 1)
    dw = product(tiny.mm(tiny.input("dy_t", 48, 8, dtype=dtype), tiny.input("x", 8, 32, dtype=dtype)))
    return tiny.call(aten.mul.Tensor, dw, gain), tiny.call(
        aten.sum.dim_IntList, tiny.call(aten.mul.Tensor, dw, w), [1], True
    )


def test_gain_follows_its_weight() -> None:
    tiny = Tiny()
    dw, dgain = scaled(tiny)
    _, plan = planned(tiny, dgain, dw)
    weight, gain = by_name(plan)["w1"], by_name(plan)["w0"]
    assert [(p.node.target, p.dim, p.lo, p.hi) for p in weight.products] == [(aten.mm.default, 0, 0, 48)]
    assert (weight.follows, weight.dim, weight.flops) == ("", 0, 2 * 48 * 8 * 32)
    assert (gain.follows, gain.products, gain.dim, gain.flops) == ("w1", (), 0, 0)
    assert plan.flops == weight.flops and plan.dense == ()


def standardized(tiny: Tiny) -> list[fx.Node]:
    """Gradients of w [32, 4, 3, 3] and gain [32] through the backward of a batch norm of each filter."""
    centered, scale, gain = tiny.input("centered", 1, 32, 36), tiny.input("scale", 32), tiny.input("gain", 32)
    dw = tiny.mm(tiny.input("dy_t", 32, 8), tiny.input("x", 8, 36))
    dw = tiny.call(aten.view.default, dw, [1, 32, 36])

    def column(node: fx.Node) -> fx.Node:
        return tiny.call(aten.unsqueeze.default, tiny.call(aten.unsqueeze.default, node, 0), 2)

    mean = column(tiny.call(aten.mul.Tensor, tiny.call(aten.sum.dim_IntList, dw, [0, 2]), 1 / 36))
    dot = tiny.call(aten.sum.dim_IntList, tiny.call(aten.mul.Tensor, dw, centered), [0, 2])
    slope = column(tiny.call(aten.mul.Tensor, tiny.call(aten.mul.Tensor, dot, 1 / 36), scale))
    rest = tiny.call(aten.sub.Tensor, tiny.call(aten.sub.Tensor, dw, tiny.call(aten.mul.Tensor, centered, slope)), mean)
    grad = tiny.call(aten.mul.Tensor, rest, column(tiny.call(aten.mul.Tensor, scale, gain)))
    return [tiny.call(aten.view.default, grad, [32, 4, 3, 3]), tiny.call(aten.mul.Tensor, dot, scale)]


def test_standardized_weight_and_gain_of_one_dimension() -> None:
    tiny = Tiny()
    _, plan = planned(tiny, *standardized(tiny))
    grads = by_name(plan)
    assert [p.dim for p in grads["w0"].products] == [0] and grads["w1"].follows == "w0" and grads["w1"].dim == 0


def test_rows_of_a_transposed_product_are_its_columns() -> None:
    tiny = Tiny()
    dw_t = tiny.mm(tiny.input("x_t", 32, 8), tiny.input("dy", 8, 48))
    grad = tiny.t(dw_t)
    dgain = tiny.call(aten.sum.dim_IntList, tiny.call(aten.mul.Tensor, grad, tiny.input("w", 48, 32)), [1])
    _, plan = planned(tiny, tiny.call(aten.mul.Tensor, grad, tiny.input("gain", 48, 1)), dgain)
    [product] = by_name(plan)["w0"].products
    assert product.dim == 1 and by_name(plan)["w1"].param.shape == (48,)


def test_gain_of_columns_cuts_columns() -> None:
    tiny = Tiny()
    dw = tiny.mm(tiny.input("dy_t", 48, 8), tiny.input("x", 8, 32))
    dgain = tiny.call(aten.sum.dim_IntList, tiny.call(aten.mul.Tensor, dw, tiny.input("w", 48, 32)), [0])
    _, plan = planned(tiny, tiny.call(aten.mul.Tensor, dw, tiny.input("gain", 32)), dgain)
    grads = by_name(plan)
    assert (grads["w0"].dim, grads["w0"].products[0].dim, grads["w1"].dim) == (1, 1, 0)


def test_weight_norm_is_one_operation() -> None:
    tiny = Tiny()
    dw = tiny.mm(tiny.input("dy_t", 48, 8), tiny.input("x", 8, 32))
    v, g, norm = tiny.input("v", 48, 32), tiny.input("g", 48, 1), tiny.input("norm", 48, 1)
    both = tiny.graph.call_function(aten._weight_norm_interface_backward.default, (dw, v, g, norm, 0))
    both.meta["val"] = v.meta["val"], g.meta["val"]
    dv, dg = (tiny.call(operator.getitem, both, i) for i in range(2))
    _, plan = planned(tiny, dv, dg)
    assert by_name(plan)["w0"].products[0].node is dw and by_name(plan)["w1"].follows == "w0"


def test_weight_used_twice_has_two_products() -> None:
    tiny = Tiny()
    again = tiny.mm(tiny.input("dz_t", 48, 8), tiny.input("y", 8, 32))
    grads = scaled(tiny, product=lambda dw: tiny.call(aten.add.Tensor, dw, again))
    _, plan = planned(tiny, *grads)
    assert len(by_name(plan)["w0"].products) == 2 and by_name(plan)["w1"].follows == "w0"


def stays(tiny: Tiny, words: str, *grads: fx.Node, others: tuple[fx.Node, ...] = ()) -> Plan:
    gm, plan = planned(tiny, *grads, others=others)
    before = str(gm.graph)
    assert plan.grads == () and any(words in skip.reason for skip in plan.dense), plan.dense
    assert mask_weight_grads(gm, plan).masked == () and str(gm.graph) == before
    return plan


def test_something_else_that_is_added_keeps_it_dense() -> None:
    for operation in (aten.sub.Tensor, aten.add.Tensor):
        tiny = Tiny()
        other = tiny.input("other", 48, 32)
        grads = scaled(tiny, product=lambda dw, op=operation, o=other, t=tiny: t.call(op, dw, o))
        stays(tiny, "something else is added to it", *grads)


def test_zeros_may_be_added() -> None:
    tiny = Tiny()
    zeros = tiny.call(aten.full.default, [48, 32], 0)
    _, plan = planned(tiny, *scaled(tiny, product=lambda dw: tiny.call(aten.add.Tensor, dw, zeros)))
    assert len(plan.grads) == 2
    tiny = Tiny()
    ones = tiny.call(aten.full.default, [48, 32], 1)
    stays(tiny, "something else", *scaled(tiny, product=lambda dw: tiny.call(aten.add.Tensor, dw, ones)))


def test_scale_of_the_whole_weight_keeps_it_dense() -> None:
    for total in (aten.sum.default, lambda node: aten.sum.dim_IntList(node, [0, 1], True)):
        tiny = Tiny()
        dw = tiny.mm(tiny.input("dy_t", 48, 8), tiny.input("x", 8, 32))
        every = tiny.call(aten.mul.Tensor, dw, tiny.input("w", 48, 32))
        if total is aten.sum.default:
            dscale = tiny.call(total, every)
        else:
            dscale = tiny.call(aten.sum.dim_IntList, every, [0, 1], True)
        plan = stays(tiny, "gradient of w1", tiny.call(aten.mul.Tensor, dw, tiny.input("scale", 1)), dscale)
        assert plan.flops == 2 * 48 * 8 * 32


def test_rows_that_depend_on_other_rows_keep_it_dense() -> None:
    tiny = Tiny()
    dw = tiny.mm(tiny.input("dy_t", 48, 8), tiny.input("x", 8, 32))
    mean = tiny.call(aten.sum.dim_IntList, dw, [0, 1], True)
    stays(tiny, "its rows", tiny.call(aten.mul.Tensor, dw, mean))


def test_divisor_from_the_product_keeps_it_dense() -> None:
    tiny = Tiny()
    dw = tiny.mm(tiny.input("dy_t", 48, 8), tiny.input("x", 8, 32))
    stays(tiny, "zeros of zeros", tiny.call(aten.div.Tensor, dw, tiny.call(aten.neg.default, dw)))


def test_other_ends_keep_it_dense_and_its_flops_are_counted_once() -> None:
    tiny = Tiny()
    grads = scaled(tiny)
    dw = grads[0].args[0]
    plan = stays(tiny, "used 3 times", *grads, others=(tiny.call(aten.neg.default, dw),))
    assert plan.flops == 0, "it makes more than gradients of weights"
    tiny = Tiny()
    grads = scaled(tiny)
    _, plan = planned(tiny, *grads, tiny.call(aten.exp.default, grads[0].args[0]))
    assert plan.grads == () and plan.flops == 2 * 48 * 8 * 32
    assert [skip.flops for skip in plan.dense] == [plan.flops, 0, 0]


def described(gm: fx.GraphModule, *params: int) -> None:
    gm.graph.output_node().meta["desc"] = [GradAOTOutput(PlainAOTInput(i)) for i in params]


@pytest.mark.parametrize("descs", [True, False])
def test_masked_chain_is_right_in_every_row(descs: bool) -> None:
    tiny = Tiny()
    gm, plan = planned(tiny, *standardized(tiny))
    if descs:
        described(gm, 0, 1)
    before = copied(gm)
    plan = mask_weight_grads(gm, plan)
    assert plan.masked == ("w0", "w1") and plan.dense == ()
    verify(before, gm.graph, plan.masked)

    args = [torch.randn(node.meta["val"].shape) for node in before.find_nodes(op="placeholder")]
    dense = fx.GraphModule({}, before)(*args)
    for ours, theirs in zip(gm(*args, torch.ones(2, dtype=torch.uint8)), dense, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(gm(*args, torch.tensor([0, 1], dtype=torch.uint8)), dense, strict=True):
        assert not ours[:16].any() and theirs[:16].all()
        torch.testing.assert_close(ours[16:], theirs[16:])


def test_another_output_in_the_backward_graph_keeps_all_of_it_dense() -> None:
    for places in ((0, 7), (0, 1, 2)):
        tiny = Tiny()
        gm, plan = planned(tiny, *scaled(tiny))
        output = gm.graph.output_node()
        output.args = ((*output.args[0], *output.args[0][: len(places) - 2]),)
        described(gm, *places)
        before = str(gm.graph)
        plan = mask_weight_grads(gm, plan)
        assert plan.masked == () and str(gm.graph) == before
        reasons = {skip.param: skip.reason for skip in plan.dense}
        assert "other things" in reasons["w0"] and "product of w0, which stays dense" in reasons["w1"]


def test_product_planned_for_one_gradient_may_not_make_several() -> None:
    tiny = Tiny()
    gm, plan = planned(tiny, *scaled(tiny))
    for grad in plan.grads:
        for product in grad.products:
            product.node.meta["convaware"] = replace(product.node.meta["convaware"], shared=())
    assert "more than this gradient" in mask_weight_grads(gm, plan).dense[0].reason


@pytest.mark.parametrize(("dtype", "dense"), [(torch.float32, False), (torch.float64, True)])
def test_what_follows_a_weight_without_kernel_stays_dense_too(dtype: torch.dtype, dense: bool) -> None:
    tiny = Tiny()
    grads = scaled(tiny, dtype=dtype)
    placeholder = tiny.input("w_of_params", 48, 32)
    placeholder.meta["val"] = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32)
    tiny.returns(*grads)
    params = (replace(param(grad, name=f"w{i}"), placeholder=placeholder) for i, grad in enumerate(grads))
    plan = locate(Plan(params=tuple(params)), graphs=True)
    reasons = {skip.param: skip.reason for skip in plan.dense}
    assert len(plan.grads) == (0 if dense else 2)
    assert not dense or ("torch.float64" in reasons["w0"] and "product of w0" in reasons["w1"])
