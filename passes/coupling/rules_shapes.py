"""How operations that move entries about carry their meaning along: reshapes, permutations, slices, concatenations."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..nodes import hint, sizes
from .axes import MOST_PARTS, Dim, Uncoupled, cut_out, fresh, join, reshape, size_of, tie
from .walk import Dims, Walk, ends, outputs, packets, tie_shapes

aten = torch.ops.aten


@ends
def _getitem(walk: Walk, node: fx.Node) -> list[Dims]:
    source, index = node.args
    return [walk.dims(source, index)]


def _reshape(walk: Walk, node: fx.Node) -> list[Dims]:
    """Where a part of the shape cannot be followed, the dimensions before and after it can."""
    before, after = walk.dims(node.args[0]), list(map(hint, sizes(node)))
    try:
        return [reshape(before, after)]
    except Uncoupled as reason:
        result = walk.dims(node)
        head = _equal(before, result)
        tail = _equal(before[head:][::-1], result[head:][::-1])
        inside = [axis for dim in before[head : len(before) - tail] for axis in dim]
        walk.lose(node, reason, tuple(inside))
        return [[*before[:head], *result[head : len(result) - tail], *before[len(before) - tail :]]]


def _as_strided(walk: Walk, node: fx.Node) -> list[Dims]:
    """A reshape, where all of a contiguous tensor is seen as another (group norms of torch are made with it)."""
    before, after = node.args[0].meta["val"], node.meta["val"]
    same = before.is_contiguous() and after.is_contiguous() and before.numel() == after.numel()
    if not same or before.storage_offset() != after.storage_offset():
        raise Uncoupled("memory seen with other strides")
    return _reshape(walk, node)


def _equal(a: Dims, b: Dims) -> int:
    """How many leading dimensions are of equal size."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if size_of(x) != size_of(y)), min(len(a), len(b)))


def _permute(walk: Walk, node: fx.Node) -> list[Dims]:
    dims = walk.dims(node.args[0])
    return [[dims[d] for d in node.args[1]]]


def _transpose(walk: Walk, node: fx.Node) -> list[Dims]:
    dims = list(walk.dims(node.args[0]))
    a, b = node.args[1:3] if len(node.args) > 1 else (0, len(dims) - 1)
    if len(dims) > 1:
        dims[a], dims[b] = dims[b], dims[a]
    return [dims]


def _expand(walk: Walk, node: fx.Node) -> list[Dims]:
    """What is repeated is new."""
    result = walk.dims(node)
    dims = walk.dims(node.args[0])
    offset = len(result) - len(dims)
    return [[dims[i - offset] if i >= offset and dims[i - offset] else dim for i, dim in enumerate(result)]]


def _repeat(walk: Walk, node: fx.Node) -> list[Dims]:
    result, dims = walk.dims(node), walk.dims(node.args[0])
    times = node.args[1]
    offset = len(result) - len(dims)
    before = [dims[i - offset] if i >= offset else () for i in range(len(result))]
    return [[_times(dim, hint(n)) if dim else new for dim, n, new in zip(before, times, result)]]


def _times(dim: Dim, times: int) -> Dim:
    if not 0 < times <= MOST_PARTS:
        raise Uncoupled(f"repeated {times} times")
    return join([dim] * times)


def _copy(walk: Walk, node: fx.Node) -> list[Dims]:
    return [walk.dims(node.args[1])]


@ends
def _slice(walk: Walk, node: fx.Node) -> list[Dims]:
    given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 1 :]]
    source, dim, start, stop, step = given
    dims = list(walk.dims(source))
    size = hint(sizes(source)[dim])
    start, stop = (None if edge is None else hint(edge) for edge in (start, stop))
    try:
        dims[dim] = cut_out(dims[dim], *slice(start, stop, step).indices(size))
    except Uncoupled as reason:
        walk.lose(node, reason, dims[dim])
        dims[dim] = walk.dims(node)[dim]
    return [dims]


@ends
def _select(walk: Walk, node: fx.Node) -> list[Dims]:
    source, dim, _ = node.args
    dims = list(walk.dims(source))
    del dims[dim]
    return [dims]


@ends
def _split(walk: Walk, node: fx.Node) -> list[Dims]:
    source = node.args[0]
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    dims = walk.dims(source)
    made: list[Dims] = []
    at = 0
    for value in node.meta["val"]:
        stop = at + hint(value.shape[dim])
        part = list(dims)
        part[dim] = cut_out(dims[dim], at, stop)
        made.append(part)
        at = stop
    return made


@ends
def _unbind(walk: Walk, node: fx.Node) -> list[Dims]:
    dims = list(walk.dims(node.args[0]))
    del dims[node.args[1] if len(node.args) > 1 else 0]
    return [dims] * outputs(node)


def _cat(walk: Walk, node: fx.Node) -> list[Dims]:
    along = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    parts = [walk.dims(part) for part in node.args[0]]
    parts = [part for part in parts if len(part) == len(walk.dims(node))]  # an empty 1-D tensor joins anything
    along %= len(parts[0])
    rest = [[dim for d, dim in enumerate(part) if d != along] for part in parts]
    for other in rest[1:]:
        for ours, theirs in zip(rest[0], other):
            try:
                tie(ours, theirs)
            except Uncoupled as reason:
                walk.lose(node, reason, theirs)
    return [[*parts[0][:along], join([part[along] for part in parts]), *parts[0][along + 1 :]]]


def _stack(walk: Walk, node: fx.Node) -> list[Dims]:
    along = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    parts = [walk.dims(part) for part in node.args[0]]
    tie_shapes(parts[0], *parts[1:])
    result = list(parts[0])
    result.insert(along % (len(result) + 1), fresh(len(parts)))
    return [result]


def _unchanged(walk: Walk, node: fx.Node) -> list[Dims]:
    """Pads: dimensions whose size stays keep their meaning."""
    source = walk.dims(node.args[0])
    return [[dim if size_of(dim) == size_of(new) else new for dim, new in zip(source, walk.dims(node))]]


def _glu(walk: Walk, node: fx.Node) -> list[Dims]:
    """One half gates the other."""
    dims = list(walk.dims(node.args[0]))
    dim = node.args[1] if len(node.args) > 1 else -1
    half = size_of(dims[dim]) // 2
    first, second = cut_out(dims[dim], 0, half), cut_out(dims[dim], half, 2 * half)
    tie(first, second)
    dims[dim] = first
    return [dims]


SHAPES: list[tuple[Callable[[Walk, fx.Node], Sequence[Dims]], list[Any]]] = [
    (_reshape, packets(aten, "view reshape _unsafe_view squeeze unsqueeze flatten _reshape_alias")),
    (_as_strided, packets(aten, "as_strided")),
    (_permute, packets(aten, "permute")),
    (_transpose, packets(aten, "transpose t")),
    (_expand, packets(aten, "expand expand_as")),
    (_repeat, packets(aten, "repeat")),
    (_copy, packets(aten, "copy")),
    (_slice, packets(aten, "slice")),
    (_select, packets(aten, "select")),
    (_split, packets(aten, "split split_with_sizes")),
    (_unbind, packets(aten, "unbind")),
    (_cat, packets(aten, "cat concat")),
    (_stack, packets(aten, "stack")),
    (_unchanged, packets(aten, "constant_pad_nd reflection_pad1d reflection_pad2d replication_pad2d pad")),
    (_glu, packets(aten, "glu")),
    (_getitem, [operator.getitem]),
]
"""Rule, and the operations that it is for."""
