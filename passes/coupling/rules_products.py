"""How products tie dimensions: matmuls, convolutions, attention, embeddings; and what they say of parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from ..nodes import hint, sizes
from .axes import Dim, reshape, size_of, tie
from .walk import Dims, Walk, ends, packets, tie_shapes

aten = torch.ops.aten


@ends
def _matmul(walk: Walk, node: fx.Node) -> list[Dims]:
    """[..., n, k] @ [..., k, m] -> [..., n, m]; for addmm and baddbmm something is added before."""
    a, b = node.args[-2:]
    ours, theirs = walk.dims(a), walk.dims(b)
    tie(ours[-1], theirs[-2])
    batch = ours[:-2]
    tie_shapes(batch, theirs[:-2])
    result = [*batch, ours[-2], theirs[-1]]
    if walk.weights(b) and not walk.weights(a):
        walk.layer(node, b, "linear", rows=theirs[-1], columns=theirs[-2], batch=_all(batch))
    elif walk.weights(a) and not walk.weights(b):
        walk.layer(node, a, "linear", rows=ours[-2], columns=ours[-1], batch=_all(batch))
    elif not walk.weights(a):
        walk.found.heads += [dim for dim in batch if dim]
        walk.found.inner.append(ours[-1])
    if len(node.args) == 3:
        added = node.args[0]
        tie_shapes(result, walk.dims(added))
        if not walk.weights(added) and walk.origin(node).follows(walk.origin(added)):
            walk.found.streams += [dim for dim in result if dim]
        for name in walk.weights(added):
            walk.found.origins[name] = walk.origin(node)
    return [result]


@ends
def _vector_product(walk: Walk, node: fx.Node) -> list[Dims]:
    """Matrix times vector, vector times vector."""
    a, b = node.args[-2:]
    ours, theirs = walk.dims(a), walk.dims(b)
    tie(ours[-1], theirs[0])
    return [ours[:-1]]


def _all(dims: Sequence[Dim]) -> Dim:
    return tuple(axis for dim in dims for axis in dim)


@ends
def _convolution(walk: Walk, node: fx.Node) -> list[Dims]:
    x, weight, bias, *_, transposed, _output_padding, groups = node.args
    image, filters = walk.dims(x), walk.dims(weight)
    if transposed:
        filters = [filters[1], filters[0], *filters[2:]]
        per_group, channels = sizes(weight)[1], sizes(weight)[0]
        channels //= groups
    else:
        per_group, channels = sizes(weight)[0] // groups, sizes(weight)[1]
    batch: Dim = ()
    if groups == 1:
        tie(image[1], filters[1])
        made = filters[0]
    elif transposed:
        # the weight is [groups x channels, filters a group, ...]
        batch, inside = reshape([image[1]], [groups, channels])
        theirs, within = reshape([filters[1]], [groups, channels])
        tie(batch, theirs)
        tie(inside, within)
        made = (*batch, *filters[0])
    else:
        batch, inside = reshape([image[1]], [groups, channels])
        theirs, made_inside = reshape([filters[0]], [groups, per_group])
        tie(batch, theirs)
        tie(inside, filters[1])
        made = (*theirs, *made_inside)
    own = walk.dims(node)
    pixels = own[2:]
    taps, after, before = (list(map(hint, sizes(value)[2:])) for value in (weight, node, x))
    if set(taps) == {1} and after == before:
        pixels = image[2:]  # 1x1: every pixel for itself
    if walk.weights(weight):
        walk.layer(node, weight, "convolution", rows=made, columns=filters[1], batch=batch)
    if isinstance(bias, fx.Node):
        tie(made, walk.dims(bias)[0])
        for name in walk.weights(bias):
            walk.found.origins[name] = walk.origin(node)
    return [[image[0], made, *pixels]]


@ends
def _embedding(walk: Walk, node: fx.Node) -> list[Dims]:
    table, indices = node.args[:2]
    entries, width = walk.dims(table)
    if walk.weights(table) and walk.origin(indices).nearest:  # constant ones: positions, and no layer
        walk.layer(node, table, "embedding", rows=width, columns=entries)
    return [[*walk.dims(indices), width]]


@ends
def _attention(walk: Walk, node: fx.Node) -> list[Dims | None]:
    """Scaled dot product attention, fused: query, key and value [B, H, T, E]; fewer key heads serve several queries."""
    query, key, value = (walk.dims(arg) for arg in node.args[:3])
    tie(query[0], key[0])
    tie(key[0], value[0])
    tie(query[-1], key[-1])
    tie(key[-2], value[-2])
    tie(key[1], value[1])
    heads = query[1]
    if size_of(heads) == size_of(key[1]):
        tie(heads, key[1])
    elif key[1]:
        shared, _each = reshape([heads], [size_of(key[1]), size_of(heads) // size_of(key[1])])
        tie(shared, key[1])
    walk.found.heads.append(heads)
    walk.found.inner += [query[-1], value[-2]]
    result = [query[0], heads, query[2], value[-1]]
    rest: list[Dims | None] = [None] * (len(node.meta["val"]) - 1 if isinstance(node.meta["val"], tuple) else 0)
    return [result, *rest]


@ends
def _grouped_matmul(walk: Walk, node: fx.Node) -> list[Dims]:
    """Tokens sorted by expert [T, K] times each expert's matrix [E, K, N] -> [T, N]."""
    a, b, borders = node.args[:3]
    ours, theirs = walk.dims(a), walk.dims(b)
    tie(ours[-1], theirs[-2])
    if len(theirs) == 3:
        tie(theirs[0], walk.dims(borders)[0])  # which experts' products have in common
    if len(theirs) == 3 and walk.weights(b) and not walk.weights(a):
        walk.layer(node, b, "linear", rows=theirs[-1], columns=theirs[-2], batch=theirs[0])
    return [[*ours[:-1], theirs[-1]]]


BY_NAME: dict[str, Callable[[Walk, fx.Node], Any]] = {"transformers.grouped_mm_fallback": _grouped_matmul}
"""Operations of libraries that may not be there."""

_ATTENTION = (
    "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math "
    "_scaled_dot_product_fused_attention_overrideable _scaled_dot_product_attention_math_for_mps"
)
PRODUCTS: dict[Any, Callable[[Walk, fx.Node], Any]] = {
    **dict.fromkeys(packets(aten, "mm bmm addmm baddbmm matmul"), _matmul),
    **dict.fromkeys(packets(aten, "mv dot"), _vector_product),
    **dict.fromkeys(packets(aten, "convolution"), _convolution),
    **dict.fromkeys(packets(aten, "embedding"), _embedding),
    **dict.fromkeys(packets(aten, _ATTENTION), _attention),
    **dict.fromkeys(packets(aten, "_grouped_mm"), _grouped_matmul),
    torch.ops.higher_order.flex_attention: _attention,
}
