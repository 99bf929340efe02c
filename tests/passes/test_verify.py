"""verify: every kind of broken promise is caught."""

from collections.abc import Callable

import pytest
from tiny import Tiny, aten, copied, marked_conv, marked_mm, masked, node_of
from torch import fx

from cacompile.kernels import masked_mm
from cacompile.passes import Broken, truncate, verify, verify_truncated
from cacompile.passes.marks import MARK
from cacompile.passes.mask import FLAGS, HOST_FLAGS

KEPT = {
    "matmul": marked_mm,
    "convolution": marked_conv,
    "convolution without dX": lambda: marked_conv(needs_dx=False),
    "convolution without bias": lambda: marked_conv(bias=False),
    "dW alone": lambda: marked_conv(needs_dx=False, bias=False),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("host", (False, True))
def test_kept_promise(name: str, host: bool) -> None:
    before, gm = masked(KEPT[name], host)
    verify(before, gm.graph, ("w",))


def drop_host(gm: fx.GraphModule) -> None:
    node_of(gm, masked_mm).update_arg(3, None)


def swap_flags(gm: fx.GraphModule) -> None:
    masked = node_of(gm, masked_mm)
    masked.args = (*masked.args[:2], masked.args[3], masked.args[2], *masked.args[4:])


def host_alone(gm: fx.GraphModule) -> None:
    [host] = gm.graph.find_nodes(op="placeholder", target=HOST_FLAGS)
    flags_of(gm).replace_all_uses_with(host)
    gm.graph.erase_node(flags_of(gm))


@pytest.mark.parametrize("break_it", [drop_host, swap_flags, host_alone])
def test_broken_promise_with_flags_on_the_host(break_it: Callable[[fx.GraphModule], None]) -> None:
    before, gm = masked(marked_mm, host=True)
    break_it(gm)
    with pytest.raises(Broken):
        verify(before, gm.graph, ("w",))


def test_nothing_masked_nothing_changed() -> None:
    gm, _ = marked_mm()
    verify(copied(gm), gm.graph, ())
    with pytest.raises(Broken, match="flags input is missing"):
        verify(copied(gm), gm.graph, ("w",))


def add_node(gm: fx.GraphModule) -> None:
    tiny = Tiny()
    tiny.graph = gm.graph
    with gm.graph.inserting_before(gm.graph.output_node()):
        tiny.call(aten.neg.default, gm.graph.find_nodes(op="placeholder")[0])


def lose_node(gm: fx.GraphModule) -> None:
    dx = node_of(gm, aten.mm.default)
    output = gm.graph.output_node()
    output.args = (tuple(None if arg is dx else arg for arg in output.args[0]),)
    gm.graph.erase_node(dx)


def change_argument(gm: fx.GraphModule) -> None:
    node_of(gm, aten.permute.default).update_arg(1, [0, 1])


def swap_operand(gm: fx.GraphModule) -> None:
    dy, _, w, *_ = gm.graph.find_nodes(op="placeholder")
    node_of(gm, aten.mm.default).args = (w, dy)


def swap_masked_operand(gm: fx.GraphModule) -> None:
    masked = node_of(gm, masked_mm)
    masked.update_arg(1, gm.graph.find_nodes(op="placeholder")[2])


def swap_outputs(gm: fx.GraphModule) -> None:
    output = gm.graph.output_node()
    output.args = (tuple(reversed(output.args[0])),)


def reorder_inputs(gm: fx.GraphModule) -> None:
    first, second, *_ = gm.graph.find_nodes(op="placeholder")
    first.prepend(second)


def flags_of(gm: fx.GraphModule) -> fx.Node:
    return gm.graph.find_nodes(op="placeholder", target=FLAGS)[0]


def flags_first(gm: fx.GraphModule) -> None:
    gm.graph.find_nodes(op="placeholder")[0].prepend(flags_of(gm))


def wrong(position: int, value: list[int]) -> Callable[[fx.GraphModule], None]:
    return lambda gm: node_of(gm, masked_mm).update_arg(position, value)


BROKEN = {
    "added node": add_node,
    "lost node": lose_node,
    "changed argument": change_argument,
    "other operand": swap_operand,
    "other operand of the masked product": swap_masked_operand,
    "outputs swapped": swap_outputs,
    "inputs reordered": reorder_inputs,
    "wrong first_flag": wrong(4, [1, 0]),
    "wrong block": wrong(5, [32, 0]),
    "wrong dimension": wrong(5, [0, 16]),
    "both dimensions": wrong(5, [16, 16]),
    "another mask": lambda gm: node_of(gm, masked_mm).update_arg(2, gm.graph.find_nodes(op="placeholder")[0]),
    "flags of the device as those of the host": lambda gm: node_of(gm, masked_mm).update_arg(3, flags_of(gm)),
    "flags before other inputs": flags_first,
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_promise(name: str) -> None:
    before, gm = masked(marked_mm)
    BROKEN[name](gm)
    with pytest.raises(Broken):
        verify(before, gm.graph, ("w",))


def test_unplanned_product_masked() -> None:
    before, gm = masked(marked_mm)
    dx = node_of(gm, aten.mm.default)
    dx.target, dx.args = masked_mm, (*dx.args, flags_of(gm), None, [0, 0], [16, 0])
    with pytest.raises(Broken, match="became"):
        verify(before, gm.graph, ("w",))


def test_planned_product_not_masked() -> None:
    gm, _ = marked_mm()
    before = copied(gm)
    with gm.graph.inserting_after(gm.graph.find_nodes(op="placeholder")[-1]):
        gm.graph.placeholder("convaware_flags")
    with pytest.raises(Broken, match="became"):
        verify(before, gm.graph, ("w",))


def test_product_masked_for_another_parameter() -> None:
    before, gm = masked(marked_mm)
    for node in before.nodes:
        node.meta.pop(MARK, None)
    with pytest.raises(Broken, match="became"):
        verify(before, gm.graph, ("w",))


def two_outputs() -> fx.GraphModule:
    """dx and dw of a linear layer, and an input that is written to."""
    graph = fx.Graph()
    dy, x, w, count = (graph.placeholder(name) for name in ("dy", "x", "w", "count"))
    dx = graph.call_function(aten.mm.default, (dy, w))
    dy_t = graph.call_function(aten.permute.default, (dy, [1, 0]))
    dw = graph.call_function(aten.mm.default, (dy_t, x))
    graph.call_function(aten.add_.Tensor, (count, 1))
    graph.output((dx, dw))
    return fx.GraphModule({}, graph)


@pytest.mark.parametrize(("places", "left"), [((0,), 3), ((1,), 2), ((0, 1), 1)])
def test_a_truncated_graph_keeps_its_promise(places: tuple[int, ...], left: int) -> None:
    gm = two_outputs()
    before = copied(gm)
    assert truncate(gm, places)
    assert sum(node.op == "call_function" for node in gm.graph.nodes) == left, "what has an effect stays"
    verify_truncated(before, gm.graph, places)


def _lose_effect(gm: fx.GraphModule) -> None:
    gm.graph.erase_node(node_of(gm, aten.add_.Tensor))


def _lose_input(gm: fx.GraphModule) -> None:
    gm.graph.erase_node(next(node for node in gm.graph.find_nodes(op="placeholder") if not node.users))


def _other_operand(gm: fx.GraphModule) -> None:
    mm = node_of(gm, aten.mm.default)
    mm.args = (mm.args[0], gm.graph.find_nodes(op="placeholder")[2])


def _one_more(gm: fx.GraphModule) -> None:
    with gm.graph.inserting_before(gm.graph.output_node()):
        gm.graph.call_function(aten.neg.default, (gm.graph.find_nodes(op="placeholder")[0],))


def _other_output(gm: fx.GraphModule) -> None:
    gm.graph.output_node().args = ((None, None),)


def _swapped(gm: fx.GraphModule) -> None:
    gm.graph.output_node().args = (tuple(reversed(gm.graph.output_node().args[0])),)


@pytest.mark.parametrize("edit", [_lose_effect, _lose_input, _other_operand, _one_more, _other_output, _swapped])
def test_a_truncated_graph_that_breaks_it(edit: Callable[[fx.GraphModule], None]) -> None:
    gm = two_outputs()
    before = copied(gm)
    truncate(gm, (0,))
    edit(gm)
    with pytest.raises(Broken):
        verify_truncated(before, gm.graph, (0,))
