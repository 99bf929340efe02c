"""What a whole step costs: FLOPs of the forward pass, dX and dW in one joint graph, by torch's own formulas."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from cacompile.torch_internals import GradAOTOutput, PlainAOTInput, flop_registry, root

from .flops import Flops
from .inside import body_of
from .joint import forward_nodes
from .plan import StepCosts
from .products import is_split, kind_and_flops, producer_of


def step_costs(graph: fx.Graph) -> StepCosts:
    """Costs of a joint graph, and what of its backward each gradient needs."""
    first = forward_nodes(graph)
    forward, products = Flops(0), list[Flops]()
    needs: dict[fx.Node, int] = {}
    for node in graph.nodes:
        flops = _flops_of(node) if node.op == "call_function" else Flops(0)
        if node in first:
            forward += flops
            continue
        needs[node] = 0
        for source in node.all_input_nodes:
            needs[node] |= needs.get(source, 0)
        if flops:
            needs[node] |= 1 << len(products)
            products.append(flops)
    output = graph.output_node()
    needed = {
        of.idx: needs.get(node, 0)
        for node, desc in zip(output.args[0], map(root, output.meta.get("desc", ())))
        if isinstance(node, fx.Node)
        and isinstance(desc, GradAOTOutput)
        and isinstance(of := root(desc.grad_of), PlainAOTInput)
    }
    return StepCosts(sum(products, forward), forward, tuple(products), tuple(needed.items()))


def _flops_of(node: fx.Node) -> Flops:
    """Of a node by itself; what computes dX and dW at once has its FLOPs where each is taken out of it."""
    if node.target is operator.getitem and isinstance(source := node.args[0], fx.Node) and is_split(source):
        found = kind_and_flops(node)
        if found is not None:
            return found[1]
        return _computed(source) + _dw_of(source) * -1 if node.args[1] == 0 else Flops(0)
    return Flops(0) if is_split(node) else _computed(node)


def _dw_of(node: fx.Node) -> Flops:
    found = (kind_and_flops(user) for user in node.users)
    return next((pair[1] for pair in found if pair is not None), Flops(0))


def _computed(node: fx.Node) -> Flops:
    formula = _formula_of(node)
    if formula is not None:
        return _counted(formula, node)
    if (body := body_of(node)) is not None:
        return sum((_flops_of(inner) for inner in body.nodes if inner.op == "call_function"), Flops(0))
    found = kind_and_flops(node)
    if found is not None and _formula_of(producer_of(node)) is None:
        return found[1]  # ours alone, such as grouped products
    return Flops(0)


def _formula_of(node: fx.Node) -> Any:
    return flop_registry.get(getattr(node.target, "overloadpacket", None))


def _counted(formula: Any, node: fx.Node) -> Flops:
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    try:
        return Flops.of_count(formula(*args, **kwargs, out_val=node.meta.get("val")))
    except Exception:
        return Flops(0)  # a formula for other arguments than these
