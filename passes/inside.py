"""dW FLOPs inside other operations: those of compiled regions are counted, others are told of. Only looks."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cacompile.torch_internals import opname

from .plan import Plan
from .products import kind_and_flops
from .rows import RESHAPES, SAME_SHAPE

aten = torch.ops.aten

_PASSED = {*SAME_SHAPE, *RESHAPES, aten.permute.default, aten.t.default, aten.transpose.int, aten.expand.default}
_PASSED |= {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.cat.default}
_PASSED |= {aten.slice.Tensor, aten.slice_scatter.default, aten.select_scatter.default, aten.sum.dim_IntList}
"""What a gradient is followed through to the operations that hold its products."""

Held = tuple[fx.Node, int]
"""An operation and one of its outputs."""

_KNOWN = {"aten", "prims", "cacompile"}
"""Libraries whose operations are what their names say."""

_RECURRENT = {"_cudnn_rnn_backward", "miopen_rnn_backward", "mkldnn_rnn_layer_backward", "lstm_mps_backward"}
"""Operations with the products of many steps inside."""


def count_inside(plan: Plan) -> Plan:
    """Add to what stays dense the FLOPs of products inside other operations; `uncounted` has those that are not."""
    dense = {skip.param: skip for skip in plan.dense}
    uncounted: list[str] = []
    counted: set[Held] = set()
    for param in sorted(plan.params, key=lambda param: -math.prod(param.shape)):
        if param.grad is None or len(param.shape) < 2:
            continue
        _, held = _reached(param.grad)  # products of the graph itself are counted already
        new = [one for one in held if one not in counted]
        counted.update(new)
        skip = dense.get(param.name)
        found = [_products(*one) if skip is not None else None for one in new]
        products = [product for inside in found for product in inside or ()]
        if None in found:  # of what is masked, nothing but what is masked is counted
            uncounted.append(param.name)
        if skip is not None and products:
            kind = products[0][0] if skip.kind == "other" else skip.kind
            dense[param.name] = replace(skip, kind=kind, flops=skip.flops + sum(flops for _, flops in products))
    return replace(plan, dense=tuple(dense.values()), uncounted=tuple(uncounted))


def _reached(value: Any) -> tuple[list[tuple[str, int]], list[Held]]:
    """(kind, FLOPs) of products that make a value, and operations that may hold more of them."""
    products: list[tuple[str, int]] = []
    held: list[Held] = []
    seen, waiting = {value}, [value]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, fx.Node):
            continue
        source, output = node.args if node.target is operator.getitem else (node, 0)
        if product := kind_and_flops(node):
            products.append(product)
        elif _may_hold(source):
            held.append((source, output))
        elif node.target in _PASSED:
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            waiting += new
    return products, held


def _may_hold(node: Any) -> bool:
    """Whether an operation may hold products that its name does not tell of."""
    library = getattr(node.target, "namespace", "aten") if node.op == "call_function" else "aten"
    return library not in _KNOWN or opname(node) in _RECURRENT


def _products(holder: fx.Node, output: int) -> list[tuple[str, int]] | None:
    """(kind, FLOPs) of every product that makes an output of an operation; None if there is no telling."""
    body = body_of(holder)
    if body is None:
        return None
    values: Any = body.output_node().args[0]
    products, held = _reached(values[output] if isinstance(values, (tuple, list)) else values)
    for one in held:
        inside = _products(*one)
        if inside is None:
            return None
        products += inside
    return products


def body_of(holder: fx.Node) -> fx.Graph | None:
    """The graph that an operation runs once; of loops and branches nobody knows how often theirs run."""
    if str(holder.target) != "invoke_subgraph" or not isinstance(body := holder.args[0], fx.Node):
        return None
    module = holder.graph.owning_module
    inside = getattr(module, str(body.target), None) if module is not None and body.op == "get_attr" else None
    return inside.graph if isinstance(inside, fx.GraphModule) else None
