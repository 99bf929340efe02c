"""The experts of transformers 5, whose operations are registered here where that package is not."""

from __future__ import annotations

import operator

import torch
from tiny import Tiny
from torch import Tensor, fx

_LIBRARY = torch.library.Library("transformers", "FRAGMENT")


def _forward(x: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    out, start = torch.zeros(len(x), weight.shape[2], dtype=x.dtype), 0
    for expert, stop in enumerate(offs.tolist()):
        torch.mm(x[start:stop], weight[expert], out=out[start:stop])
        start = stop
    return out


def _backward(x: Tensor, weight: Tensor, offs: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    dx, dw, start = torch.zeros_like(x), torch.zeros_like(weight), 0
    for expert, stop in enumerate(offs.tolist()):
        torch.mm(grad[start:stop], weight[expert].T, out=dx[start:stop])
        torch.mm(x[start:stop].T, grad[start:stop], out=dw[expert])
        start = stop
    return dx, dw


if not hasattr(torch.ops.transformers, "grouped_mm_fallback_backward"):
    _LIBRARY.define("grouped_mm_fallback(Tensor input, Tensor weight, Tensor offs) -> Tensor")
    _LIBRARY.define(
        "grouped_mm_fallback_backward(Tensor input, Tensor weight, Tensor offs, Tensor grad_output) -> (Tensor, Tensor)"
    )
    _LIBRARY.impl("grouped_mm_fallback", _forward, "CPU")
    _LIBRARY.impl("grouped_mm_fallback_backward", _backward, "CPU")


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
