"""guard: planned products become their masked twins, all else stays as it was."""

from collections.abc import Callable

import pytest
import torch
from tiny import Tiny, aten, copied, marked_conv, marked_mm, param
from torch.testing import FileCheck

from cacompile.passes import group, guard_weight_grads, locate, mark_products
from cacompile.passes.guard import FLAGS as FLAGS_INPUT
from cacompile.passes.guard import HOST_FLAGS, MARK, Mark
from cacompile.plan import Plan

FLAGS = torch.tensor([1, 0, 0, 1], dtype=torch.uint8)


def on(rows: int) -> torch.Tensor:
    return FLAGS.repeat_interleave(16)[:rows].bool()


def test_matmul_gradient_becomes_masked() -> None:
    gm, plan = marked_mm()
    before = copied(gm)
    plan = guard_weight_grads(gm, plan)
    assert plan.guarded == ("w",) and plan.skips == ()
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
    plan = guard_weight_grads(gm, plan, host=True)
    names = [node.target for node in gm.graph.find_nodes(op="placeholder")]
    assert names[-2:] == [FLAGS_INPUT, HOST_FLAGS]
    FileCheck().check(call.format("convaware_flags, convaware_host_flags")).run(gm.code)

    args = [torch.randn(node.meta["val"].shape) for node in gm.graph.find_nodes(op="placeholder")[:-2]]
    with_host = gm(*args, FLAGS, FLAGS)
    gm, plan = make()
    guard_weight_grads(gm, plan)
    for one, other in zip(with_host, gm(*args, FLAGS), strict=True):
        assert torch.equal(one, other)


def test_nothing_guarded_nothing_added() -> None:
    gm, plan = marked_mm()
    for node in gm.graph.nodes:
        node.meta.pop(MARK, None)
    guard_weight_grads(gm, plan, host=True)
    assert len(gm.graph.find_nodes(op="placeholder")) == 3


def test_batched_product_is_masked_along_its_own_dimension() -> None:
    tiny = Tiny()
    dy, x = tiny.input("dy", 4, 8, 6), tiny.input("x", 4, 8, 5)
    dw = tiny.call(aten.bmm.default, tiny.call(aten.permute.default, dy, [0, 2, 1]), x)
    gm = tiny.returns(dw)
    plan = group(locate(Plan(params=(param(dw),))), block_rows=1)
    mark_products(plan)
    assert guard_weight_grads(gm, plan).guarded == ("w",)
    call = "cacompile.masked_bmm.default(permute_default, x, convaware_flags, None, [0, 0, 0], [1, 0, 0])"
    FileCheck().check(call).run(gm.code)


def test_convolution_is_split() -> None:
    gm, plan = marked_conv()
    plan = guard_weight_grads(gm, plan)
    assert plan.guarded == ("w",)
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
        assert guard_weight_grads(gm, plan).guarded == ("w",)
        FileCheck().check_not("convolution_backward").check("masked_conv_dw").run(gm.code)


def test_shared_gradient_is_left_alone_and_says_why() -> None:
    gm, plan = marked_mm()
    tiny = Tiny()
    tiny.graph = gm.graph
    [dw] = [node for node in gm.graph.nodes if MARK in node.meta]
    with gm.graph.inserting_before(gm.graph.output_node()):
        tiny.call(aten.exp.default, dw)
    before = str(gm.graph)
    plan = guard_weight_grads(gm, plan)
    assert plan.guarded == () and "more than this gradient" in plan.skips[0].reason and str(gm.graph) == before


def test_lost_product_is_left_alone_and_says_why() -> None:
    gm, plan = marked_mm()
    for node in gm.graph.nodes:
        node.meta.pop(MARK, None)
    before = str(gm.graph)
    plan = guard_weight_grads(gm, plan)
    assert "0 of its 1 products reached" in plan.skips[0].reason and str(gm.graph) == before


def test_product_that_became_something_else_is_left_alone_and_says_why() -> None:
    gm, plan = marked_mm()
    [dw] = [node for node in gm.graph.nodes if MARK in node.meta]
    dw.target = torch.matmul
    assert "turned its product into" in guard_weight_grads(gm, plan).skips[0].reason


def test_mark_says_where_a_part_begins() -> None:
    tiny = Tiny()
    parts = [tiny.mm(tiny.input(f"a{i}", 32, 8), tiny.input(f"b{i}", 8, 32)) for i in range(2)]
    grad = tiny.call(aten.cat.default, parts)
    tiny.graph.output((grad,))
    plan = group(locate(Plan(params=(param(grad),))), block_rows=16)
    mark_products(plan)
    assert [p.meta[MARK] for p in parts] == [Mark("w", (0, 0), (16, 0)), Mark("w", (2, 0), (16, 0))]
    assert parts[1].meta[MARK].only == (2, 16, 0)
