"""Gradients that share the products they are made from, such as those of a normalized weight and its gain. Only looks.

    dw    = mm(dy_t, x)                          # of the weight that was used: gain * v / |v|, row by row
    dgain = sum(dw * v, columns) / |v|
    dv    = (dw - v * dgain / |v|) * gain / |v|

Where every operation on the way keeps rows apart and makes zeros of zeros, rows of `dw` that are zero are zero in both,
and all other rows are what they were. The largest parameter gets the products, the others follow it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from .plan import Param, WeightGrad
from .products import kind_and_flops, make_grad
from .rows import RESHAPES, SAME_SHAPE, ZEROS, Rows, Unfit, shape, through_permute, through_reshape, through_sum
from .trace import product_of

aten = torch.ops.aten

_SAME = {*SAME_SHAPE, aten.mul.Scalar, aten.div.Scalar}
_MOVES = dict.fromkeys(RESHAPES, through_reshape) | dict.fromkeys(
    (aten.permute.default, aten.t.default), through_permute
)
_MOVES |= {aten.sum.dim_IntList: through_sum, aten.mean.dim: through_sum}
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_BROADCASTS = {*_SUMS, aten.mul.Tensor, aten.div.Tensor, aten.where.self, aten.expand.default}
_TOTAL = aten.sum.default
"""Understood, so that the reason for what stays dense can say whose gradient it is."""

_WEIGHT_NORM = aten._weight_norm_interface_backward.default

_KNOWN = {*_SAME, *_MOVES, *_BROADCASTS, _TOTAL, _WEIGHT_NORM}

Places = dict[fx.Node, Rows | None]
"""Where the rows lie in each node; None where two ways to it do not agree."""


def chain(start: Param, dim: int, owners: Mapping[fx.Node, Param]) -> tuple[WeightGrad, ...] | None:
    """All gradients that are made of the products that make this one; first the one that is given them.

    owners: gradient -> parameter, of all that may be among them. None if no product flows into gradients alone, by
    operations that are known here; raises Unfit if some does but does not keep its rows apart.
    """
    assert start.grad is not None
    places: Places = {}
    _place(start.grad, Rows(dim, 1, 0, start.shape[dim]), places)
    members = {start.name: (start, dim)}
    while True:
        seeds = [n for n in places if kind_and_flops(n) is not None and _computed_from([n], owners) is not None]
        inside = _computed_from(seeds, owners)
        if not inside:
            return None
        new = [owners[node] for node in inside if node in owners and owners[node].name not in members]
        if not new:
            break
        for param in new:
            members[param.name] = param, _join(param, inside, places)
    for node in inside:
        if node not in seeds:
            _prove(node, inside, places)
    products = []
    for seed in seeds:
        if (rows := places[seed]) is None or (product := product_of(seed, rows)) is None:
            raise Unfit("its rows lie in two ways in one product")
        products.append(product)
    leader = max((param for param, _ in members.values()), key=lambda param: math.prod(param.shape))
    first = make_grad(leader, tuple(products), members.pop(leader.name)[1])
    return first, *(
        WeightGrad(param, (), first.kind, dim, first.unit, follows=leader.name) for param, dim in members.values()
    )


def _place(node: fx.Node, rows: Rows, places: Places) -> bool:
    """Follow rows back to products and whatever else; returns whether a node was met that had been placed alike."""
    met = False
    waiting = [(node, rows)]
    while waiting:
        node, rows = waiting.pop()
        if node in places:
            met |= places[node] == rows
            places[node] = rows if places[node] == rows else None
            continue
        places[node] = rows
        if node.op == "call_function" and kind_and_flops(node) is None:
            try:
                waiting += _operands(node, rows).items()
            except Unfit:
                continue  # matters only if a product flows into this node, and then `_prove` says so
    return met


def _join(param: Param, inside: Collection[fx.Node], places: Places) -> int:
    """Place another gradient that the products flow into; returns the dimension along which its rows lie."""
    assert param.grad is not None
    for dim, size in enumerate(param.shape):
        trial = dict(places)
        if _place(param.grad, Rows(dim, 1, 0, size), trial) and all(trial.get(n, ()) is not None for n in inside):
            places.update(trial)
            return dim
    raise Unfit(f"its product also makes the gradient of {param.name}, where its rows cannot be told apart")


def _computed_from(seeds: Collection[fx.Node], owners: Mapping[fx.Node, Param]) -> dict[fx.Node, None] | None:
    """These nodes and all that is computed from them; None if that is more than gradients, or by unknown operations."""
    found = dict.fromkeys(seeds)
    waiting = list(seeds)
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.op == "output":
                if node not in owners:
                    return None
            elif user not in found:
                if not _is_known(user):
                    return None
                found[user] = None
                waiting.append(user)
    return found


def _is_known(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        source: Any = node.args[0]
        return source.target is _WEIGHT_NORM
    return node.target in _KNOWN


def _operands(node: fx.Node, rows: Rows) -> dict[fx.Node, Rows]:
    """Where the rows of a node lie in what it is computed from; operands that have no such rows are left out."""
    first: Any = node.args[0]
    if not _is_known(node):
        raise Unfit(f"gradient comes from {node.target}")
    if node.target in _SAME or node.target is operator.getitem:
        return {first: rows}
    if move := _MOVES.get(node.target):
        return {first: move(node, rows)}
    if node.target is _WEIGHT_NORM:
        *_, dim = node.args
        if rows.dim != dim or rows.inner != 1:
            raise Unfit("weights are normalized over their rows")
        return {first: rows}
    found = {}
    for operand in node.all_input_nodes:
        dim = rows.dim - len(shape(node)) + len(shape(operand))
        if dim >= 0 and shape(operand)[dim] == shape(node)[rows.dim]:
            found[operand] = Rows(dim, rows.inner, rows.lo, rows.hi)
    return found


def _prove(node: fx.Node, inside: Collection[fx.Node], places: Places) -> None:
    """Raise Unfit unless rows of a node are zero where they are in its operands `inside`, and come from no others."""
    rows = places.get(node)
    if rows is None:
        raise Unfit(f"its rows cannot be followed through {node.target}")
    operands = _operands(node, rows)
    for operand in node.all_input_nodes:
        if operand in inside and (operand not in operands or places.get(operand) != operands[operand]):
            raise Unfit(f"its rows are not kept apart by {node.target}")
    must, must_not = _roles(node)
    if not all(operand in inside or _is_zero(operand) for operand in must):
        raise Unfit(f"something else is added to it by {node.target}")
    if any(operand in inside for operand in must_not):
        raise Unfit(f"{node.target} does not make zeros of zeros")


def _roles(node: fx.Node) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments of which all must come from the products, or be zeros, and those that must not come from them."""
    if node.target in _SUMS:
        return node.args[:2], ()
    if node.target is aten.where.self:
        return node.args[1:], node.args[:1]
    if node.target in (aten.div.Tensor, _WEIGHT_NORM):
        return node.args[:1], node.args[1:]
    return (), ()


def _is_zero(argument: Any) -> bool:
    if not isinstance(argument, fx.Node):
        return bool(argument == 0)
    if argument.target in ZEROS:
        return True
    filled = argument.target in (aten.full.default, aten.full_like.default) and argument.args[1] == 0
    return filled or (argument.target is aten.scalar_tensor.default and argument.args[0] == 0)
