"""How operations tie the dimensions of what they read to those of what they make; one function a family of them.

Each takes the walk and the node and returns the dimensions of its outputs, one entry each; None leaves an output's own
new ones. An operation without a rule cuts the coupling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from cacompile.torch_internals import inductor_prims  # noqa: F401 - operations of its own, which rules are for

from ..nodes import sizes
from .rules_lookups import LOOKUPS
from .rules_products import BY_NAME, PRODUCTS
from .rules_shapes import SHAPES
from .walk import Dims, Walk, ends, outputs, packets, tie_shapes

aten = torch.ops.aten
prims = torch.ops.prims

Rule = Callable[[Walk, fx.Node], Sequence[Dims | None]]


def _tensors(walk: Walk, node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]


@ends
def _pointwise(walk: Walk, node: fx.Node) -> list[Dims]:
    """Entry by entry: what broadcasts together is one.

    Values that no layer had a part in, and that several operations read, such as rotary angles, masks and position
    biases, do not tie the layers that share them.
    """
    operands = _tensors(walk, node)
    aside = [n for n in operands if walk.shared(n)]
    if len(aside) == len(operands) or not any(walk.is_activation(n) for n in operands):
        aside = []
    result = walk.dims(node)
    tie_shapes(result, *(walk.dims(operand) for operand in operands if operand not in aside))
    for operand in operands:
        if walk.weights(operand) and sizes(operand)[-1:] == (1,):  # lies along the channels of an image
            for name in walk.weights(operand):
                origin = walk.origin(node)
                walk.found.origins[name] = walk.found.origins.get(name, origin) | origin
    activations = [n for n in operands if walk.is_activation(n)]
    if getattr(node.target, "overloadpacket", None) in (aten.add, aten.sub) and len(activations) == 2:
        walk.added(result, *activations)
    return [result]


def _same(walk: Walk, node: fx.Node) -> list[Dims]:
    """Every output of the input's shape is of its dimensions: softmax, cumulative sums, dropout."""
    dims = walk.dims(node.args[0])
    return [dims] * outputs(node)


@ends
def _made(walk: Walk, node: fx.Node) -> list[None]:
    """Out of nothing, or of the shape of something: constants, random numbers."""
    walk.constant(node)
    return [None] * outputs(node)


@ends
def _counted(walk: Walk, node: fx.Node) -> list[None]:
    """Whole numbers of what values are; no gradient comes back through them."""
    return [None] * outputs(node)


@ends
def _reduce(walk: Walk, node: fx.Node) -> list[Dims]:
    """Sums, means, maxima: what is left keeps its meaning."""
    source = walk.dims(node.args[0])
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    gone = range(len(source)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {d % max(1, len(source)) for d in gone}
    kept: Dims = [() if d in gone else dim for d, dim in enumerate(source)]
    if len(walk.dims(node)) != len(source):
        kept = [dim for d, dim in enumerate(source) if d not in gone]
    return [kept] * outputs(node)


@ends
def _pool(walk: Walk, node: fx.Node) -> list[Dims]:
    """Pooling and resizing: batch and channels stay, pixels are new."""
    source = walk.dims(node.args[0])
    kept = len(source) - (3 if "3d" in str(node.target) else 2)
    return [[*source[:kept], *walk.dims(node, output)[kept:]] for output in range(outputs(node))]


def _norm(walk: Walk, node: fx.Node) -> list[Dims | None]:
    """Norms that were left whole: scale and shift lie along the last dimensions, or along the channels."""
    source = walk.dims(node.args[0])
    last = "layer_norm" in str(node.target) or "rms_norm" in str(node.target)
    for operand in node.all_input_nodes[1:]:
        dims = walk.dims(operand)
        place = source[len(source) - len(dims) :] if last else source[1:2]
        if [d == () for d in dims] == [d == () for d in place]:
            tie_shapes(place, dims)
            for name in walk.weights(operand):
                walk.found.origins[name] = walk.origin(node)
    return [source, *[None] * (outputs(node) - 1)]


_FAMILIES: list[tuple[Rule, list[Any]]] = [
    *SHAPES,
    *LOOKUPS,
    (_reduce, packets(aten, "sum mean amax amin max min var var_mean prod any all argmax argmin logsumexp norm std")),
    (_reduce, packets(aten, "linalg_vector_norm")),
    (_same, packets(aten, "_softmax _log_softmax softmax log_softmax cumsum cumprod logcumsumexp native_dropout")),
    (_same, packets(aten, "tril triu lift_fresh_copy contiguous alias detach clone _to_copy")),
    (_same, [*packets(prims, "convert_element_type device_put")]),
    (_made, packets(aten, "full zeros ones empty arange scalar_tensor rand randn randint eye randperm")),
    (_made, packets(aten, "new_full new_zeros new_ones new_empty full_like zeros_like ones_like empty_like")),
    (_made, packets(aten, "rand_like randn_like linspace tril_indices triu_indices")),
    (_counted, packets(aten, "histc bincount searchsorted bucketize one_hot")),
    (_made, packets(prims, "iota inductor_seed inductor_seeds inductor_lookup_seed inductor_random rand")),
    (_pool, packets(aten, "max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d")),
    (_pool, packets(aten, "max_pool3d_with_indices avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d")),
    (_pool, packets(aten, "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d")),
    (_pool, packets(prims, "_low_memory_max_pool_with_offsets")),
    (_norm, packets(aten, "native_layer_norm native_group_norm _fused_rms_norm native_batch_norm")),
    (_norm, packets(aten, "_native_batch_norm_legit _native_batch_norm_legit_functional cudnn_batch_norm")),
]
_EVERYTHING_ELSE: dict[Any, Rule] = {packet: rule for rule, family in _FAMILIES for packet in family}


class _Rules(dict):
    """Families by name; any other operation that torch tags as pointwise by that."""

    def __missing__(self, packet: Any) -> Rule:
        if str(packet) in BY_NAME:
            return BY_NAME[str(packet)]
        overloads = getattr(packet, "overloads", None)
        if overloads and torch.Tag.pointwise in getattr(packet, overloads()[0]).tags:
            return _pointwise
        raise KeyError(packet)


RULES = _Rules({**_EVERYTHING_ELSE, **PRODUCTS})
