"""How entries that are looked up, put elsewhere or sorted keep their meaning: gathers, scatters, and their like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..nodes import hint, sizes
from .axes import Uncoupled, cut_out, size_of, tie
from .walk import Dims, Walk, ends, outputs, packets, tie_shapes

aten = torch.ops.aten
prims = torch.ops.prims

LookupRule = Callable[[Walk, fx.Node], Sequence[Dims | None]]


def _along(walk: Walk, node: fx.Node) -> list[Dims]:
    """Sorted or turned along one dimension, which is new; the others stay."""
    source = walk.dims(node.args[0])
    places = [a for a in node.args[1:] if isinstance(a, (int, list))]
    given = places[-1 if "roll" in str(node.target) else 0] if places else node.kwargs.get("dim", -1)
    gone = {d % len(source) for d in (given if isinstance(given, list) else [given])}
    result = []
    for output in range(outputs(node)):
        own = walk.dims(node, output)
        result.append([own[d] if d in gone else dim for d, dim in enumerate(source)])
    return result


@ends
def _topk(walk: Walk, node: fx.Node) -> list[Dims]:
    """Those that come out are no fixed ones: nothing reads an entry for what it is."""
    source = walk.dims(node.args[0])
    dim = (node.args[2] if len(node.args) > 2 else -1) % len(source)
    return [[walk.dims(node, o)[d] if d == dim else kept for d, kept in enumerate(source)] for o in (0, 1)]


@ends
def _gather(walk: Walk, node: fx.Node) -> list[Dims]:
    """Dimensions other than the one gathered along stay where they are whole.

    Where others are gathered for each entry of those, such as relative positions, nothing reads one for what it is.
    """
    source, dim = walk.dims(node.args[0]), node.args[1]
    own = walk.dims(node)
    whole = [size_of(kept) == size_of(new) for kept, new in zip(source, own)]
    whole[dim] = False
    index = sizes(_narrow(node.args[2]))
    if not any(size != 1 for d, size in enumerate(index, len(own) - len(index)) if d != dim % len(own)):
        _lose_fixed(walk, node, [node.args[2]], [kept for kept, keep in zip(source, whole) if not keep])
    return [[kept if keep else new for kept, new, keep in zip(source, own, whole)]]


@ends
def _index_select(walk: Walk, node: fx.Node) -> list[Dims]:
    source, dim, index = node.args
    dims = list(walk.dims(source))
    _lose_fixed(walk, node, [index], [dims[dim]])
    dims[dim] = walk.dims(node)[dim]
    return [dims]


@ends
def _index(walk: Walk, node: fx.Node) -> list[Dims]:
    """Looked up by tensors: what is not indexed stays."""
    source = walk.dims(node.args[0])
    indices: Any = next(arg for arg in node.args[1:] if isinstance(arg, (list, tuple)))
    indexed, at = _indexed(indices)
    _lose_fixed(walk, node, [index for index in indices if index is not None], [source[d] for d in indexed])
    own = walk.dims(node)
    looked_up = len(own) - (len(source) - len(indexed))
    kept = [dim for d, dim in enumerate(source) if d not in indexed]
    return [[*kept[:at], *own[at : at + looked_up], *kept[at:]]]


def _indexed(indices: Sequence[Any]) -> tuple[list[int], int]:
    """Dimensions that these tensors index, and where in the result what they look up begins."""
    indexed: list[int] = []
    dim = 0
    for index in indices:
        # a mask stands for as many dimensions as it has
        span = len(sizes(index)) if index is not None and index.meta["val"].dtype in (torch.bool, torch.uint8) else 1
        if index is not None:
            indexed += range(dim, dim + span)
        dim += span
    neighbours = indexed == list(range(indexed[0], indexed[-1] + 1))
    return indexed, indexed[0] if neighbours else 0


def _narrow(node: Any) -> Any:
    """What was expanded to this node."""
    while node.target is aten.expand.default:
        node = node.args[0]
    return node


def _lose_fixed(walk: Walk, node: fx.Node, indices: Sequence[Any], gone: Dims) -> None:
    """Entries of an activation that are looked up by constants are fixed ones, but it is not known which."""
    source: Any = node.args[0]
    if walk.is_activation(source) and not any(map(walk.is_activation, indices)):
        for dim in gone:
            if walk.matters(source, dim):
                walk.lose(node, Uncoupled("looked up by constants"), dim)


def _scatter(walk: Walk, node: fx.Node) -> list[Dims]:
    """Put or added along one dimension: index_add, scatter, ...; all others are those of what it is put into."""
    into, along, index, *rest = node.args
    base = _base(walk, node)
    source = next((arg for arg in rest if isinstance(arg, fx.Node)), None)
    if source is not None and len(dims := walk.dims(source)) == len(base):
        reach = sizes(index) if len(sizes(index)) == len(base) else sizes(source)
        for d, size in enumerate(map(hint, reach)):
            if d != along % len(base):
                tie(cut_out(base[d], 0, size), cut_out(dims[d], 0, size))
        if "add" in str(node.target) or node.kwargs.get("reduce", "sum") in ("add", "sum", "mean"):
            walk.added(base, into, source)
    return [base]


def _index_put(walk: Walk, node: fx.Node) -> list[Dims]:
    """Put or added where tensors say: what is not indexed is that of what it is put into."""
    into, *rest = node.args
    indices: Any = next(arg for arg in rest if isinstance(arg, (list, tuple)))
    values = rest[rest.index(indices) + 1]
    base = _base(walk, node)
    indexed, at = _indexed(indices)
    behind = [dim for d, dim in enumerate(base) if d not in indexed][at:]
    tie_shapes(behind, walk.dims(values)[-len(behind) :] if behind else [])
    if at:  # dimensions before those that are indexed, where the values have all
        before = base[:at]
        dims = walk.dims(values)
        looked_up = max(len(sizes(index)) for index in indices if index is not None)
        if len(dims) == at + looked_up + len(behind):
            tie_shapes(before, dims[:at])
    if "accumulate" in str(node.target) or True in (*rest[2:], node.kwargs.get("accumulate")):
        walk.added(base, into, values)
    return [base]


def _base(walk: Walk, node: fx.Node) -> Dims:
    """Dimensions of what something is put into; new ones of zeros, which must not tie the layers that share them."""
    into: Any = node.args[0]
    return walk.dims(node) if walk.shared(into) else walk.dims(into)


def _slice_scatter(walk: Walk, node: fx.Node) -> list[Dims]:
    given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 2 :]]
    _, source, along, start, stop, step = given
    base, dims = _base(walk, node), list(walk.dims(source))
    along %= len(base)
    size = hint(sizes(node)[along])
    start, stop = (None if edge is None else hint(edge) for edge in (start, stop))
    place = list(base)
    place[along] = cut_out(base[along], *slice(start, stop, step).indices(size))
    tie_shapes(place, dims)
    return [base]


@ends
def _select_scatter(walk: Walk, node: fx.Node) -> list[Dims]:
    _, source, along, _ = node.args
    base = _base(walk, node)
    tie_shapes([dim for d, dim in enumerate(base) if d != along % len(base)], walk.dims(source))
    return [base]


def _masked_scatter(walk: Walk, node: fx.Node) -> list[Dims]:
    """Entries one behind the other, wherever the mask is: whole rows where it is the same all along them."""
    _, mask, source = node.args
    base, dims = _base(walk, node), walk.dims(source)
    narrow = _narrow(mask)
    for d in range(1, min(len(base), len(dims)) + 1):
        if (len(sizes(narrow)) >= d and sizes(narrow)[-d] != 1) or size_of(base[-d]) != size_of(dims[-d]):
            break
        tie(base[-d], dims[-d])
    return [base]


@ends
def _segments(walk: Walk, node: fx.Node) -> list[Dims]:
    """Sums, means or maxima of neighbouring entries along one dimension, which is new."""
    dims = list(walk.dims(node.args[0]))
    along = node.kwargs.get("axis", 0)
    dims[along] = walk.dims(node)[along]
    return [dims]


@ends
def _bags(walk: Walk, node: fx.Node) -> list[Dims | None]:
    """Rows of a table that are looked up and summed; messages, where the table is no weight."""
    table, indices = node.args[:2]
    entries, width = walk.dims(table)
    if walk.weights(table) and walk.origin(indices).nearest:
        walk.layer(node, table, "embedding", rows=width, columns=entries)
    return [[walk.dims(node)[0], width], *[None] * (outputs(node) - 1)]


LOOKUPS: list[tuple[LookupRule, list[Any]]] = [
    (_along, packets(aten, "sort flip roll argsort")),
    (_along, packets(prims, "rev")),
    (_topk, packets(aten, "topk")),
    (_gather, packets(aten, "gather")),
    (_index_select, packets(aten, "index_select")),
    (_index, packets(aten, "index _unsafe_index _unsafe_masked_index")),
    (_scatter, packets(aten, "scatter scatter_add scatter_reduce index_add index_copy index_reduce index_fill")),
    (_index_put, packets(aten, "index_put _unsafe_index_put _unsafe_masked_index_put_accumulate")),
    (_slice_scatter, packets(aten, "slice_scatter")),
    (_select_scatter, packets(aten, "select_scatter")),
    (_masked_scatter, packets(aten, "masked_scatter")),
    (_segments, packets(aten, "segment_reduce")),
    (_bags, packets(aten, "_embedding_bag _embedding_bag_forward_only")),
]
"""Rule, and the operations that it is for."""
