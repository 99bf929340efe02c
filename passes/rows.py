"""Where a parameter's rows lie in a node of its gradient, and in what that node was computed from."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .nodes import sizes

aten = torch.ops.aten
prims = torch.ops.prims

SAME_SHAPE = {prims.convert_element_type.default, aten._to_copy.default}
SAME_SHAPE |= {aten.clone.default, aten.alias.default, aten.neg.default}
RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.squeeze.default}
RESHAPES |= {aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default}
ZEROS = {aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default}
CONSTANTS = {aten.full.default, aten.full_like.default, *ZEROS}


class Unfit(Exception):
    """This gradient cannot be masked; the text says why."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows `lo:hi` of the parameter lie along `dim` of a node, `inner` neighbouring entries a row."""

    dim: int
    inner: int
    lo: int
    hi: int


def shape(node: Any) -> tuple[int, ...]:
    found = sizes(node)
    if not all(isinstance(size, int) for size in found):
        raise Unfit("gradient passes through a shape that is not known when compiling")
    return found


def through_reshape(node: fx.Node, rows: Rows) -> Rows:
    """The same rows in the tensor before the reshape; a row may become several neighbouring entries or fewer."""
    before, after = shape(node.args[0]), shape(node)
    outer = math.prod(after[: rows.dim])
    for dim, size in enumerate(before):
        if math.prod(before[:dim]) != outer or (size == 1 and after[rows.dim] != 1):
            continue
        inner = rows.inner
        if size % after[rows.dim] == 0:  # further dimensions were merged into this one
            inner *= size // after[rows.dim]
        elif after[rows.dim] % size == 0 and inner % (after[rows.dim] // size) == 0:  # a row's entries were split off
            inner //= after[rows.dim] // size
        else:
            break
        return replace(rows, dim=dim, inner=inner)
    raise Unfit(f"rows cannot be followed through a reshape {list(before)} -> {list(after)}")


def through_permute(node: fx.Node, rows: Rows) -> Rows:
    order: Any = node.args[1] if len(node.args) > 1 else (1, 0)  # aten.t
    return replace(rows, dim=order[rows.dim] % len(order))


def through_sum(node: fx.Node, rows: Rows) -> Rows:
    ndim = len(shape(node.args[0]))
    dims: Any = node.args[1]
    summed = {d % ndim for d in dims} if dims else set(range(ndim))
    keepdim = len(node.args) > 2 and bool(node.args[2])
    kept = list(range(ndim)) if keepdim else [d for d in range(ndim) if d not in summed]
    if kept[rows.dim] in summed:
        raise Unfit("gradient is summed over the rows themselves")
    return replace(rows, dim=kept[rows.dim])
