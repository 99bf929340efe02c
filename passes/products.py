"""What makes a weight gradient, and what it costs: the kind and FLOPs of matmuls and convolutions."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_MATMULS = {aten.mm.default: "linear", aten.bmm.default: "batched"}


def kind_and_flops(result: fx.Node) -> tuple[str, int] | None:
    """Kind and FLOPs (two a multiply-add) of the product whose result this is; None if it is none that makes a dW."""
    if kind := _MATMULS.get(result.target):
        return kind, 2 * _numel(result) * hint(sizes(result.args[0])[-1])
    if result.target is operator.getitem and result.args[1] == 1:
        conv = result.args[0]
        if conv.target is aten.convolution_backward.default:
            grad_out, x, *_, transposed, _output_padding, _groups, _mask = conv.args
            batch, _channels, *pixels = map(hint, sizes(x if transposed else grad_out))
            return "convolution", 2 * _numel(result) * batch * math.prod(pixels)
    return None


def sizes(node: Any) -> tuple[Any, ...]:
    """Sizes of a node's result, dynamic ones as they are."""
    return tuple(node.meta["val"].shape)


def hint(size: Any) -> int:
    """The size seen when compiling, also of a dynamic dimension."""
    return size if isinstance(size, int) else size.node.hint or 1


def _numel(node: Any) -> int:
    return math.prod(map(hint, sizes(node)))
