"""What surrounds one parameter's weight gradient in a graph: operands, products, groups, and where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from cacompile.errors import ConvAwareError, unknown
from cacompile.pages.html import kind_class
from cacompile.passes.joint import forward_nodes
from cacompile.passes.mask import FLAGS, HOST_FLAGS
from cacompile.passes.nodes import needed, reached
from cacompile.passes.products import producer_of
from cacompile.passes.truncate import grad_places
from cacompile.torch_internals import PlainAOTInput, opname

from .code import TITLES
from .drawing import Box, Drawing, Edge, facts, title
from .facts import Context, Facts
from .families import ExplainedFamily, families_of, slice_text
from .products import ExplainedProduct, Version, figure, is_view, operands, tangents, through_views


@dataclass(slots=True)
class _Around:
    """Collects nodes."""

    found: Version
    nodes: dict[fx.Node, None] = field(default_factory=dict)
    origins: dict[fx.Node, None] = field(default_factory=dict)
    """Where operands of the products are computed."""

    def add(self, nodes: Sequence[fx.Node]) -> None:
        self.nodes.update(dict.fromkeys(nodes))


def neighbourhood(found: Facts, param: str, version: str | None, graph: int | None) -> Drawing:
    """The neighbourhood of the dW of `param`; see `Explanation.show`."""
    if graph is not None:
        found.context(graph)
    rows = [row for row in found.rows if row.param == param and (graph is None or row.graph == graph)]
    if not rows:
        inside = "" if graph is None else f" in graph {graph}"
        raise unknown(f"parameter{inside}", param, {row.param for row in found.rows if graph in (None, row.graph)})
    row = next((row for row in rows if row.operation), rows[0])
    if row.graph < 0:
        raise ConvAwareError(f"parameter {param!r} cannot be shown: it is {row.reason}")
    context = found.context(row.graph)
    version = version or ("masked" if context.graphs.maskable else "joint")
    if version == "forward":
        raise unknown("version with weight gradients", version, ("joint", "backward", "masked"))
    families = [family for family in families_of(found) if family.name in row.families]
    return around(context, param, version, families, row.reason)


def around(context: Context, param: str, version: str, families: Sequence[ExplainedFamily], reason: str) -> Drawing:
    """The neighbourhood of the dW of `param`, by the model's name; reason: why it stays dense, or empty.

    families: those that it has groups in.
    """
    found = Version.of(context, version)
    grad = _gradient(found, param)
    centers = [node for node, product in found.products.items() if param == product.param or param in product.also]
    near = _Around(found)
    _add_forward(near, param)
    for center in centers or ([grad] if grad is not None else []):
        _add_center(near, center)
    if grad is not None:
        ways = needed([grad])
        for center in centers:
            for node in reached(center):
                if node in ways:
                    near.add([node] if node is center else [node, *node.all_input_nodes])
    order = [node for node in found.graph.nodes if node in near.nodes]
    incoming = {each for node in tangents(found.graph) for each in reached(node)}
    colour = kind_class(families[0].kind if families else "")
    boxes = [_box(near, node, node in incoming, colour) for node in order]
    arrows = [(source.name, node.name) for node in order for source in node.all_input_nodes if source in near.nodes]
    for family in families:
        boxes.append(_groups(family, param))
        flags = [node.name for node in order if node.target == FLAGS]
        arrows += [(_key(family), name) for name in flags or [center.name for center in centers]]
    if grad is not None:
        why = (f"dense: {reason}",) if reason else ()
        look = "plain strong" if reason else f"{colour} strong"
        boxes.append(_plain("dW of it", look, "gradient", f"dW of {param}", (_shape(grad), *why), f"dW of {param}"))
        arrows.append((grad.name, "dW of it"))
    number, count = context.graphs.number, context.count
    where = f"{TITLES[version]}; graph {number} of {count}" if count > 1 else TITLES[version]
    heading = (title(f"dW of {param}"), *facts(where, *([] if grad is not None else [f"dense: {reason}"])))
    return Drawing(heading, tuple(boxes), edges=tuple(Edge(*ends) for ends in dict.fromkeys(arrows)))


def _add_center(near: _Around, center: fx.Node) -> None:
    """A product and its operands, back to where they are computed."""
    source = producer_of(center)
    near.add([center, source])
    for operand in operands(center) or source.all_input_nodes:
        path = through_views(operand)
        near.add(path)
        near.origins[path[-1]] = None
    near.add([node for node in source.all_input_nodes if node.target in (FLAGS, HOST_FLAGS)])


def _add_forward(near: _Around, param: str) -> None:
    """In a joint graph, the parameter and what the forward makes of it."""
    if near.found.name != "joint":
        return
    names = near.found.context.graphs.inputs
    forward = forward_nodes(near.found.graph)
    for node in near.found.graph.find_nodes(op="placeholder"):
        desc = node.meta.get("desc")
        if isinstance(desc, PlainAOTInput) and names.get(desc.idx) == param:
            waiting = [node]
            while waiting:
                one = waiting.pop()
                near.add([one])
                if one is node or is_view(one):
                    waiting += [user for user in one.users if user in forward]


def _gradient(found: Version, param: str) -> fx.Node | None:
    """What is returned as the gradient of a parameter; None where nothing is."""
    places = grad_places(found.graph)
    own = (places[i] for i, name in found.context.graphs.inputs.items() if name == param and i in places)
    return next((found.graph.output_node().args[0][place] for place in own), None)


def _box(near: _Around, node: fx.Node, incoming: bool, colour: str) -> Box:
    """incoming: it depends on the gradient of an output."""
    found = near.found
    tip = str(node.format_node() or node.name)
    product = found.products.get(node)
    if product is not None:
        return _product(node, product, tip, colour)
    graphs = found.context.graphs
    desc = node.meta.get("desc")
    params = graphs.inputs
    shape = _shape(node)
    if node.target == FLAGS:
        count = f"{graphs.plan.blocks} blocks of this graph"
        return _plain(node.name, "plain strong", "flags, 0: skip", FLAGS, (count,), tip)
    if node.target == HOST_FLAGS:
        return _plain(node.name, "plain strong", "the same in CPU memory", HOST_FLAGS, (), tip)
    if node.op == "placeholder" and isinstance(desc, PlainAOTInput) and desc.idx in params:
        return _plain(node.name, "plain strong", "parameter", params[desc.idx], (f"{node.name} {shape}",), tip)
    if node.op == "placeholder":
        what = "gradient of an output" if incoming else "input" if found.name == "joint" else "saved by the forward"
        return _plain(node.name, "plain" if incoming else "plain strong", what, node.name, (shape,), tip)
    name = f"{node.name} {shape}".strip()
    operation = _operation(node)
    if is_view(node):
        return _plain(node.name, "dense", operation, name, (), tip)
    if node in near.origins:
        operation = f"{'incoming gradient' if incoming else 'activation'}, from {operation}"
    return _plain(node.name, "plain", operation, name, (), tip)


def _plain(key: str, classes: str, what: str, name: str, more: Sequence[str], tip: str) -> Box:
    """what: its role, in words."""
    return Box(key, (*facts(what), title(name), *facts(*filter(None, more))), classes, tip)


def _product(node: fx.Node, product: ExplainedProduct, tip: str, colour: str) -> Box:
    name = f"{node.name} {_shape(node)}".strip()
    share = f"{figure(product.flops)} FLOPs, {product.share:.1%} of all dW"
    blocks = f"{product.blocks} × {product.block} {product.along}"
    if product.operation:
        first, stop = product.flags
        how = f"some off: {product.kernel}" if product.blocks > 1 else "all of it or nothing"
        more = [f"{blocks}, flags {first}:{stop}", share, how]
    else:
        more = [blocks, share]
    return _plain(node.name, f"{colour} strong", product.operation or _operation(node), name, more, tip)


def _key(family: ExplainedFamily) -> str:
    return f"groups {family.name}"  # no name of a node


def _groups(family: ExplainedFamily, param: str) -> Box:
    group = family.groups[0]
    others = [name for name in (*family.params, *family.elsewhere) if name != param]
    more = [f"{family.count} {'group' if family.count == 1 else 'groups'} of {family.units}"]
    more += [f"with {name}" for name in others[:4]] + ([f"and {len(others) - 4} more"] if len(others) > 4 else [])
    tip = "\n".join([f"{group.name} is", *map(slice_text, group.slices)])
    return _plain(_key(family), kind_class(family.kind), "groups", family.name, more, tip)


def _operation(node: fx.Node) -> str:
    return opname(node) or getattr(node.target, "__name__", str(node.target))


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"[{', '.join(map(str, value.shape))}]" if hasattr(value, "shape") else ""
