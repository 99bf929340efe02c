"""The experts of transformers 5, as graphs built by hand."""

from __future__ import annotations

import operator

import torch
import transformers.integrations.moe  # noqa: F401  registers its operations
from tiny import Tiny
from torch import fx


def experts_backward(tiny: Tiny, *, transposed: bool) -> tuple[fx.Node, fx.Node]:
    """dX [24, 12] and dW [4, 12, 16]; transposed: the weights lie in memory as [4, 16, 12]."""
    x, dy = tiny.input("x", 24, 12), tiny.input("dy", 24, 16)
    weight = tiny.input("weight", 4, 12, 16)
    if transposed:
        weight.meta["val"] = torch.empty(4, 16, 12, device="meta").mT
    offs = tiny.input("offs", 4, dtype=torch.int32)
    both = tiny.graph.call_function(torch.ops.transformers.grouped_mm_fallback_backward.default, (x, weight, offs, dy))
    both.meta["val"] = torch.empty_like(x.meta["val"]), torch.empty_like(weight.meta["val"])
    return tiny.call(operator.getitem, both, 0), tiny.call(operator.getitem, both, 1)
