"""Swap weight-gradient products for their masked replacements. The only pass that edits, and only the planned nodes."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from cacompile.torch_internals import GradAOTOutput, PlainAOTInput

from .kinds import Extra, kind_called, kind_of
from .marks import MARK, Mark
from .nodes import exits, reached, uses
from .plan import Plan, Product, StaysDense, WeightGrad
from .products import follows_dense, result_of

FLAGS = "convaware_flags"
"""Name of the extra graph input: one uint8 for each block of the graph, 0 = skip."""

HOST_FLAGS = "convaware_host_flags"
"""Name of a second extra input, where asked for: the same flags in CPU memory."""


def mark_products(plan: Plan) -> None:
    """Write each planned product's Mark on its node: the partitioner copies `meta` into the backward graph."""
    for grad in plan.grads:
        members = [grad, *(other for other in plan.grads if other.follows == grad.param.name)]
        shared = tuple(member.param.index for member in members)
        for product in grad.products:
            result = result_of(product.node)
            straight = result is None or all(uses(node) == 1 for node in reached(result))
            product.node.meta[MARK] = _mark(grad, product, () if straight else shared)


def _mark(grad: WeightGrad, product: Product, shared: tuple[int, ...]) -> Mark:
    first_flag, block = grad.first_flag + product.lo // grad.block, grad.block * product.inner
    here = [dim == product.dim for dim in range(kind_called(product.kind).rank)]
    return Mark(grad.param.name, tuple(first_flag * on for on in here), tuple(block * on for on in here), shared)


def mask_weight_grads(gm: fx.GraphModule, plan: Plan, host: bool = False, flags: fx.Node | None = None) -> Plan:
    """Swap each marked product of a backward or joint graph for its masked replacement.

    Before:  dw = mm(dy_t, x)
    After:   dw = masked_mm(dy_t, x, flags, host, [first_flag, 0], [block, 0])
             # zeros where flags[first_flag + row // block] == 0

    The flags are one more input, unless the graph has them already, as `flags`. host: they are two, the second being
    the flags in CPU memory; otherwise that argument is None, as it must be in a graph that is captured (CUDA graphs) or
    on CPUs, where the flags are in CPU memory.

    Where one operation computes more than the weight gradient it is split (`kinds`: convolutions, experts).
    A parameter whose products did not all reach this graph unchanged stays dense, with the reason in `dense`, and so do
    those that follow it.
    """
    marked: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if mark := node.meta.get(MARK):
            marked.setdefault(mark.param, []).append(node)
    reasons = {g.param.name: _why_not(g, marked.get(g.param.name, [])) for g in plan.grads if not g.follows}
    extra: Extra | None = (flags, None) if flags is not None else None
    for name in [name for name, reason in reasons.items() if reason is None]:
        extra = extra or (_input(gm.graph, FLAGS), _input(gm.graph, HOST_FLAGS) if host else None)
        for node in marked[name]:
            kind = kind_of(node)
            assert kind is not None
            kind.mask(node, extra, node.meta[MARK])
    for grad in plan.grads:
        if grad.follows:
            is_dense = reasons.get(grad.follows, "") is not None
            reasons[grad.param.name] = follows_dense(grad) if is_dense else None
    if extra:
        gm.graph.lint()
        gm.recompile()
    masked = tuple(g.param.name for g in plan.grads if reasons[g.param.name] is None)
    dense = [StaysDense(g.param.name, g.kind, reason, g.flops) for g in plan.grads if (reason := reasons[g.param.name])]
    return replace(plan, masked=masked, dense=(*plan.dense, *dense))


def _why_not(grad: WeightGrad, nodes: list[fx.Node]) -> str | None:
    if len(nodes) != len(grad.products):
        return f"{len(nodes)} of its {len(grad.products)} products reached the backward graph as they were planned"
    shared: list[fx.Node] = []
    params: tuple[int, ...] = ()
    for node in nodes:
        if kind_of(node) is None:
            return f"the compiler's own passes turned its product into {node.target}"
        result, mark = result_of(node), node.meta[MARK]
        if result is not None and mark.shared:
            shared, params = [*shared, result], mark.shared
        elif result is None or uses(result) != 1 or len(exits(result)) != 1:
            return "its product makes more than this gradient in the backward graph"
    if shared and not _make_just(shared, params):
        return "its product makes other things in the backward graph than the gradients that were planned"
    return None


def _make_just(results: list[fx.Node], params: tuple[int, ...]) -> bool:
    """Whether these nodes are made into the gradients of these parameters, all of them, and nothing else."""
    places = {place for result in results for place in exits(result)}
    descs = results[0].graph.output_node().meta.get("desc")
    if descs is None or len(places) != len(params):
        return len(places) == len(params)
    made = [desc.grad_of for place in places if isinstance(desc := descs[place], GradAOTOutput)]
    # an exported joint graph has names in place of positions, and its inputs in their order
    inputs = {node.meta.get("desc"): i for i, node in enumerate(results[0].graph.find_nodes(op="placeholder"))}
    return sorted(d.idx if isinstance(d, PlainAOTInput) else inputs.get(d, -1) for d in made) == sorted(params)


def _input(graph: fx.Graph, name: str) -> fx.Node:
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        return graph.placeholder(name)
