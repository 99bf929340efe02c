"""mask: planned products become their masked replacements, all else stays as it was."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from experts import experts_backward
from tiny import Tiny, aten, copied, marked_conv, marked_mm, param
from torch import fx
from torch.testing import FileCheck

from cacompile.passes import group, locate, mark_products, mask_weight_grads, verify
from cacompile.passes.marks import MARK, Mark
from cacompile.passes.mask import FLAGS as FLAGS_INPUT
from cacompile.passes.mask import HOST_FLAGS
from cacompile.passes.plan import Plan

FLAGS = torch.tensor([1, 0, 0, 1], dtype=torch.uint8)


def on(rows: int) -> torch.Tensor:
    return FLAGS.repeat_interleave(16)[:rows].bool()


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


@pytest.mark.parametrize("make, call", ((marked_mm, "x, {}, [0, 0], [16, 0])"), (marked_conv, "x, w, {}, 0, 16, 0")))
def test_flags_on_the_host_are_a_second_input_where_asked_for(make: Callable[[], tuple], call: str) -> None:
    gm, plan = make()
    plan = mask_weight_grads(gm, plan, host=True)
    names = [node.target for node in gm.graph.find_nodes(op="placeholder")]
    assert names[-2:] == [FLAGS_INPUT, HOST_FLAGS]
    FileCheck().check(call.format("convaware_flags, convaware_host_flags")).run(gm.code)

    args = [torch.randn(node.meta["val"].shape) for node in gm.graph.find_nodes(op="placeholder")[:-2]]
    with_host = gm(*args, FLAGS, FLAGS)
    gm, plan = make()
    mask_weight_grads(gm, plan)
    for one, other in zip(with_host, gm(*args, FLAGS), strict=True):
        assert torch.equal(one, other)


def test_nothing_guarded_nothing_added() -> None:
    gm, plan = marked_mm()
    for node in gm.graph.nodes:
        node.meta.pop(MARK, None)
    mask_weight_grads(gm, plan, host=True)
    assert len(gm.graph.find_nodes(op="placeholder")) == 3


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


def test_shared_gradient_is_left_alone_and_says_why() -> None:
    gm, plan = marked_mm()
    tiny = Tiny()
    tiny.graph = gm.graph
    [dw] = [node for node in gm.graph.nodes if MARK in node.meta]
    with gm.graph.inserting_before(gm.graph.output_node()):
        tiny.call(aten.exp.default, dw)
    before = str(gm.graph)
    plan = mask_weight_grads(gm, plan)
    assert plan.masked == () and "more than this gradient" in plan.dense[0].reason and str(gm.graph) == before


def test_lost_product_is_left_alone_and_says_why() -> None:
    gm, plan = marked_mm()
    for node in gm.graph.nodes:
        node.meta.pop(MARK, None)
    before = str(gm.graph)
    plan = mask_weight_grads(gm, plan)
    assert "0 of its 1 products reached" in plan.dense[0].reason and str(gm.graph) == before


def test_product_that_became_something_else_is_left_alone_and_says_why() -> None:
    gm, plan = marked_mm()
    [dw] = [node for node in gm.graph.nodes if MARK in node.meta]
    dw.target = torch.matmul
    assert "turned its product into" in mask_weight_grads(gm, plan).dense[0].reason


def test_mark_says_where_a_part_begins() -> None:
    tiny = Tiny()
    parts = [tiny.mm(tiny.input(f"a{i}", 32, 8), tiny.input(f"b{i}", 8, 32)) for i in range(2)]
    grad = tiny.call(aten.cat.default, parts)
    tiny.graph.output((grad,))
    plan = group(locate(Plan(params=(param(grad),))), block_rows=16)
    mark_products(plan)
    assert [p.meta[MARK] for p in parts] == [Mark("w", (0, 0), (16, 0)), Mark("w", (2, 0), (16, 0))]
    assert parts[1].meta[MARK].only == (2, 16, 0)


def by_hand(tiny: Tiny, grad: fx.Node, dim: int, *others: fx.Node) -> tuple[fx.GraphModule, Plan]:
    """A graph that returns this gradient, and its plan in blocks of 2 along `dim`."""
    gm = tiny.returns(grad, *others)
    [found] = locate(Plan(params=(param(grad),))).grads
    [found] = [cut for cut in (found, *found.others) if cut.dim == dim]
    plan = Plan(grads=(replace(found, block=2, first_flag=3, others=()),))
    mark_products(plan)
    return gm, plan


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
