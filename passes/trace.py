"""From the gradient of one parameter back to the products that are summed or joined into it. Only looks.

    dw_t = mm(x_t, dy)          weight `w` of shape [N, K]: rows of `w` are columns of the product,
    dw   = permute(dw_t)        so Product(dw_t, dim=1)

Nothing on the way may be used for anything else; gradients that share what makes them are `chains`' matter.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cacompile.torch_internals import opname

from .kinds import kind_of
from .nodes import uses
from .plan import Product
from .products import SCATTERS, is_gathered, kind_and_flops, producer_of
from .rows import CONSTANTS, RESHAPES, SAME_SHAPE, Rows, Unfit, shape, through_permute, through_reshape, through_sum

aten = torch.ops.aten

DIMENSIONS = 3
"""Leading dimensions of a parameter, or of a product, along which it may be cut: rows, columns, and experts or heads
before them."""

_REASONS = dict.fromkeys(SCATTERS, "an embedding: its gradient is a scatter into the rows that were looked up")
_REASONS["expand"] = "its gradient is broadcast from a smaller one"
_REASONS["slice"] = "its gradient is cut out of a product that makes other gradients as well"


def trace(node: Any, rows: Rows) -> list[Product]:
    """Products under `node` that make these rows; raises Unfit where the way back is not understood."""
    if not isinstance(node, fx.Node):
        return []
    if node.op != "call_function":
        raise Unfit(f"gradient comes from the graph's input {node.name}")
    if node.target in CONSTANTS:
        return []
    if (count := uses(node)) != 1:
        raise Unfit(f"{node.target} is used {count} times, so masking it would change something else")
    if node.target in SAME_SHAPE:
        return trace(node.args[0], rows)
    if node.target in RESHAPES:
        return trace(node.args[0], through_reshape(node, rows))
    if step := _STEPS.get(node.target):
        return step(node, rows)
    if product := product_of(node, rows):
        return [product]
    raise Unfit(no_way(node))


def _add(node: fx.Node, rows: Rows) -> list[Product]:
    """A sum is masked where its addends can be; an addend that cannot (a tied embedding's scatter) is computed.

    What it gives to a skipped row does not last: the estimate, which is one of the whole gradient, replaces it.
    """
    found: list[Product] = []
    reasons = []
    for addend in node.args[:2]:
        try:
            if isinstance(addend, fx.Node) and shape(addend) != shape(node):
                raise Unfit("gradient is broadcast into a sum")
            found += trace(addend, rows)
        except Unfit as unfit:
            reasons.append(str(unfit))
    if reasons and not found:
        raise Unfit(reasons[0])
    return found


def _mul(node: fx.Node, rows: Rows) -> list[Product]:
    reasons = []
    for factor in node.args[:2]:
        if isinstance(factor, fx.Node) and shape(factor) == shape(node):
            try:
                if found := trace(factor, rows):
                    return found
            except Unfit as unfit:
                reasons.append(str(unfit))
    raise Unfit(reasons[0] if reasons else f"{node.target} of broadcast operands")


def _cat(node: fx.Node, rows: Rows) -> list[Product]:
    """Parts laid one behind the other: rows of the parameter if joined along them, columns otherwise."""
    parts = node.args[0]
    along = (node.args[1] if len(node.args) > 1 else 0) % len(shape(node))
    found: list[Product] = []
    start = rows.lo
    for part in parts:
        if along != rows.dim:
            found += trace(part, rows)
            continue
        size = shape(part)[along]
        if size % rows.inner:
            raise Unfit("parts are joined inside a row")
        found += trace(part, replace(rows, lo=start, hi=start + size // rows.inner))
        start += size // rows.inner
    return found


def _slice_scatter(node: fx.Node, rows: Rows) -> list[Product]:
    base, part = node.args[:2]
    rest: list[Any] = [*node.args[2:], *(0, None, None, 1)[len(node.args) - 2 :]]
    dim, start, stop, step = rest
    if step != 1:
        raise Unfit(f"gradient of a slice with step {step}")
    dim %= len(shape(node))
    size = shape(node)[dim]
    start, stop, _ = slice(start, stop).indices(size)
    inside = rows
    if dim == rows.dim:
        if start % rows.inner or stop % rows.inner:
            raise Unfit("a slice cuts through a row")
        inside = replace(rows, lo=rows.lo + start // rows.inner, hi=rows.lo + stop // rows.inner)
    return trace(base, rows) + trace(part, inside)


def _select_scatter(node: fx.Node, rows: Rows) -> list[Product]:
    base, part, dim, index = node.args
    dim %= len(shape(node))
    if dim != rows.dim:
        inside = replace(rows, dim=rows.dim - (dim < rows.dim))
    elif rows.inner == 1:  # one row is the whole part: all of its first dimension
        row = rows.lo + index % shape(node)[dim]
        inside = Rows(0, shape(part)[0], row, row + 1)
    else:
        raise Unfit("a selection cuts through a row")
    return trace(base, rows) + trace(part, inside)


_STEPS: dict[Any, Callable[[fx.Node, Rows], list[Product]]] = {
    aten.permute.default: lambda node, rows: trace(node.args[0], through_permute(node, rows)),
    aten.t.default: lambda node, rows: trace(node.args[0], through_permute(node, rows)),
    aten.sum.dim_IntList: lambda node, rows: trace(node.args[0], through_sum(node, rows)),
    aten.add.Tensor: _add,
    aten.mul.Tensor: _mul,
    aten.mul.Scalar: lambda node, rows: trace(node.args[0], rows),
    aten.cat.default: _cat,
    aten.slice_scatter.default: _slice_scatter,
    aten.select_scatter.default: _select_scatter,
}


def product_of(result: fx.Node, rows: Rows) -> Product | None:
    """The product whose result this is, masked along these rows; None if it is the result of something else.

    Raises Unfit where these rows of a product cannot be left out.
    """
    found = kind_and_flops(result)
    if found is None:
        return None
    node, (name, flops) = producer_of(result), found
    kind = kind_of(node)
    if kind is not None and (reason := kind.unfit(node, rows.dim, rows.inner)):
        raise Unfit(reason)
    if shape(result)[rows.dim] != (rows.hi - rows.lo) * rows.inner:
        raise Unfit(f"rows {rows.lo}:{rows.hi} do not fill dimension {rows.dim} of {node.target}")
    if rows.dim >= DIMENSIONS:
        raise Unfit(f"rows lie along dimension {rows.dim} of {node.target}")
    return Product(node, name, rows.dim, rows.inner, rows.lo, rows.hi, flops)


def no_way(node: fx.Node) -> str:
    """Why the way back ends at a node that is neither a product nor understood."""
    if node.target is operator.getitem:
        source, index = node.args
        return f"gradient is output {index} of {getattr(source, 'target', source)}"
    if is_gathered(node):
        return "weights were gathered for each token: its gradient is a scatter of outer products, one a token"
    found = _REASONS.get(opname(node))
    return found or f"gradient comes from {node.target}, only matmuls and convolutions are masked"
