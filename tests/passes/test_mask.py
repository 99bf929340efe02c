"""mask: planned products become their masked replacements, all else stays as it was."""

from collections.abc import Callable

import pytest
import torch
from tiny import FLAGS, Tiny, aten, marked_conv, marked_mm, param
from torch.testing import FileCheck

from cacompile.passes import group, locate, mark_products, mask_weight_grads
from cacompile.passes.marks import MARK, Mark
from cacompile.passes.mask import FLAGS as FLAGS_INPUT
from cacompile.passes.mask import HOST_FLAGS
from cacompile.passes.plan import Plan


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


def test_nothing_marked_nothing_added() -> None:
    gm, plan = marked_mm()
    for node in gm.graph.nodes:
        node.meta.pop(MARK, None)
    mask_weight_grads(gm, plan, host=True)
    assert len(gm.graph.find_nodes(op="placeholder")) == 3


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
