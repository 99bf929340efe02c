"""What surrounds one parameter's weight gradient in a graph: operands, products, groups, and where it goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import fx
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, PlainAOTInput, TangentAOTInput

from cacompile.errors import ConvAwareError, unknown
from cacompile.joint import forward_nodes
from cacompile.passes.guard import FLAGS, HOST_FLAGS
from cacompile.passes.products import reached, source_of

from .annotate import TITLES
from .groups import Group
from .picture import Family, families_of, slice_text
from .sites import Context, Site, Version, figure, is_view, operands, through_views

if TYPE_CHECKING:
    from .explain import Explanation

ROLES = ("saved", "parameter", "incoming", "computed", "view", "flags", "groups", "masked", "product", "gradient")
"""Roles of what is drawn."""


@dataclass(frozen=True, slots=True)
class Spot:
    """One thing to draw: a node of the graph, or a family of groups."""

    key: str
    role: str
    """Among ROLES."""
    what: str
    """Its role, in words."""
    name: str
    facts: tuple[str, ...]
    tip: str
    kind: str = ""
    """Of the groups, for its colour; empty for what has none."""


@dataclass(frozen=True, slots=True)
class Sketch:
    """What is to be drawn, in the graph's order."""

    title: str
    facts: tuple[str, ...]
    spots: tuple[Spot, ...]
    arrows: tuple[tuple[str, str], ...]
    """(from, to), keys of spots."""


@dataclass(slots=True)
class _Around:
    """Collects nodes."""

    found: Version
    nodes: dict[fx.Node, None] = field(default_factory=dict)
    origins: dict[fx.Node, None] = field(default_factory=dict)
    """Where operands of the products are computed."""

    def add(self, nodes: Sequence[fx.Node]) -> None:
        self.nodes.update(dict.fromkeys(nodes))

    def arrows(self) -> Iterator[tuple[fx.Node, fx.Node]]:
        for node in self.nodes:
            for source in node.all_input_nodes:
                if source in self.nodes:
                    yield source, node


def sketch_of(found: Explanation, param: str, version: str | None, graph: int | None) -> Sketch:
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
    version = version or ("guarded" if context.graphs.guardable else "joint")
    if version == "forward":
        raise unknown("version with weight gradients", version, ("joint", "backward", "guarded"))
    families = [family for family in families_of(found) if family.name in row.families]
    return around(context, param, version, families, row.reason)


def around(context: Context, param: str, version: str, families: Sequence[Family], reason: str) -> Sketch:
    """The neighbourhood of the dW of `param`, by the model's name; reason: why it stays dense, or empty.

    families: those that it has groups in.
    """
    found = Version.of(context, version)
    grad = _gradient(found, param)
    centers = [node for node, site in found.sites.items() if param == site.param or param in site.also]
    near = _Around(found)
    _add_forward(near, param)
    for center in centers or ([grad] if grad is not None else []):
        _add_center(near, center)
    if grad is not None:
        ways = {grad, *_ancestors(grad)}
        for center in centers:
            for node in reached(center):
                if node in ways:
                    near.add([node] if node is center else [node, *node.all_input_nodes])
    order = [node for node in found.graph.nodes if node in near.nodes]
    near.nodes = dict.fromkeys(order)
    tangents = _from_tangents(found.graph)
    kind = families[0].kind if families else ""
    spots = [_spot(near, node, node in tangents, kind) for node in order]
    arrows = [(source.name, node.name) for source, node in near.arrows()]
    for family in families:
        spots.append(_family(family, param))
        flags = [node.name for node in order if node.target == FLAGS]
        arrows += [(_key(family), name) for name in flags or [center.name for center in centers]]
    if grad is not None:
        shape = _shape(grad)
        facts = tuple(filter(None, [shape, f"dense: {reason}" if reason else ""]))
        end = Spot(
            "dW of it", "gradient", "gradient", f"dW of {param}", facts, f"dW of {param}", "" if reason else kind
        )
        spots.append(end)
        arrows.append((grad.name, end.key))
    number, count = context.graphs.number, context.count
    where = f"{TITLES[version]}; graph {number} of {count}" if count > 1 else TITLES[version]
    facts = (where, *([] if grad is not None else [f"dense: {reason}"]))
    return Sketch(f"dW of {param}", facts, tuple(spots), tuple(dict.fromkeys(arrows)))


def _add_center(near: _Around, center: fx.Node) -> None:
    """A product and its operands, back to where they are computed."""
    source = source_of(center)
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
    graphs = near.found.context.graphs
    indices = {p.index for p in graphs.plan.params if graphs.names.get(p.name, p.name) == param}
    forward = forward_nodes(near.found.graph)
    for node in near.found.graph.find_nodes(op="placeholder"):
        desc = node.meta.get("desc")
        if isinstance(desc, PlainAOTInput) and desc.idx in indices:
            waiting = [node]
            while waiting:
                one = waiting.pop()
                near.add([one])
                if one is node or is_view(one):
                    waiting += [user for user in one.users if user in forward]


def _gradient(found: Version, param: str) -> fx.Node | None:
    """What is returned as the gradient of a parameter; None where nothing is."""
    graphs = found.context.graphs
    indices = {p.index for p in graphs.plan.params if graphs.names.get(p.name, p.name) == param}
    output = found.graph.output_node()
    for value, desc in zip(output.args[0], output.meta.get("desc", ())):
        if isinstance(desc, GradAOTOutput) and isinstance(desc.grad_of, PlainAOTInput) and desc.grad_of.idx in indices:
            return value if isinstance(value, fx.Node) else None
    return None


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen, waiting = set(), [node]
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in seen]
        seen.update(new)
        waiting += new
    return seen


def _from_tangents(graph: fx.Graph) -> set[fx.Node]:
    """All that depends on the gradient of an output."""
    found: set[fx.Node] = set()
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get("desc"), TangentAOTInput) or node.name.startswith("tangents"):
            found.update(reached(node))
    return found


def _spot(near: _Around, node: fx.Node, incoming: bool, kind: str) -> Spot:
    """incoming: it depends on the gradient of an output."""
    found = near.found
    site = found.sites.get(node)
    tip = str(node.format_node() or node.name)
    if site is not None:
        return _product(node, site, tip, kind)
    graphs = found.context.graphs
    desc = node.meta.get("desc")
    params = {p.index: graphs.names.get(p.name, p.name) for p in graphs.plan.params}
    shape = _shape(node)
    if node.target == FLAGS:
        return Spot(node.name, "flags", "flags, 0: skip", FLAGS, (f"{graphs.plan.blocks} blocks of this graph",), tip)
    if node.target == HOST_FLAGS:
        return Spot(node.name, "flags", "the same in CPU memory", HOST_FLAGS, (), tip)
    if node.op == "placeholder" and isinstance(desc, PlainAOTInput) and desc.idx in params:
        return Spot(node.name, "parameter", "parameter", params[desc.idx], (f"{node.name} {shape}",), tip)
    if node.op == "placeholder":
        what = "gradient of an output" if incoming else "saved by the forward"
        if found.name == "joint" and not incoming:
            what = "input"
        return Spot(node.name, "incoming" if incoming else "saved", what, node.name, (shape,), tip)
    name = f"{node.name} {shape}".strip()
    operation = _operation(node)
    if is_view(node):
        return Spot(node.name, "view", operation, name, (), tip)
    if node not in near.origins:
        return Spot(node.name, "computed", operation, name, (), tip)
    what = f"{'incoming gradient' if incoming else 'activation'}, from {operation}"
    return Spot(node.name, "incoming" if incoming else "computed", what, name, (), tip)


def _product(node: fx.Node, site: Site, tip: str, kind: str) -> Spot:
    name = f"{node.name} {_shape(node)}".strip()
    share = f"{figure(site.flops)} FLOPs, {site.share:.1%} of all dW"
    blocks = f"{site.blocks} × {site.block} {site.along}"
    if not site.operation:
        return Spot(node.name, "product", _operation(node), name, (blocks, share), tip, kind)
    first, stop = site.flags
    facts = (
        f"{blocks}, flags {first}:{stop}",
        share,
        f"some off: {site.kernel}" if site.blocks > 1 else "all of it or nothing",
    )
    return Spot(node.name, "masked", site.operation, name, facts, tip, kind)


def _key(family: Family) -> str:
    return f"groups {family.name}"  # no name of a node


def _family(family: Family, param: str) -> Spot:
    group: Group = family.groups[0]
    others = [name for name in (*family.params, *family.elsewhere) if name != param]
    facts = [f"{family.count} {'group' if family.count == 1 else 'groups'} of {family.units}"]
    facts += [f"with {name}" for name in others[:4]] + ([f"and {len(others) - 4} more"] if len(others) > 4 else [])
    tip = "\n".join([f"{group.name} is", *map(slice_text, group.slices)])
    return Spot(_key(family), "groups", "groups", family.name, tuple(facts), tip, family.kind)


def _operation(node: fx.Node) -> str:
    name = getattr(node.target, "_opname", "")
    return name or getattr(node.target, "__name__", str(node.target))


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    return f"[{', '.join(map(str, value.shape))}]" if hasattr(value, "shape") else ""
