"""What a whole step costs: FLOPs of the forward pass, dX and dW in one joint graph, by torch's own formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from cacompile.torch_internals import flop_registry

from .flops import Flops
from .inside import body_of
from .products import kind_and_flops, producer_of


def step_flops(graph: fx.Graph) -> Flops:
    """FLOPs of all matrix products, convolutions and attention of a joint graph.

    What recomputing activations adds is not part of it. Operations without a formula count nothing, as everywhere.
    """
    total = Flops(0)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        formula = _formula_of(node)
        if formula is not None:
            total += _counted(formula, node)
        elif (body := body_of(node)) is not None:
            total += step_flops(body)
        elif (found := kind_and_flops(node)) is not None and _formula_of(producer_of(node)) is None:
            total += found[1]  # ours alone, such as grouped products
    return total


def _formula_of(node: fx.Node) -> Any:
    return flop_registry.get(getattr(node.target, "overloadpacket", None))


def _counted(formula: Any, node: fx.Node) -> Flops:
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    try:
        return Flops.of_count(formula(*args, **kwargs, out_val=node.meta.get("val")))
    except Exception:
        return Flops(0)  # a formula for other arguments than these
