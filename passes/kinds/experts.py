"""Experts of transformers: one operation of its own for the backward of all, which gives dX and dW."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from cacompile.kernels import masked_grouped_mm

from ..marks import Mark
from ..nodes import hint, output_of, sizes
from .base import Extra, Kind, call_before, replace_node

aten = torch.ops.aten

BACKWARD = "transformers.grouped_mm_fallback_backward.default"
"""As text, because nobody needs transformers: (x [S, K], w [E, K, N], offs [E], dy [S, N]) -> (dx, dw)."""


class Experts(Kind):
    """dX becomes their forward with each expert's weights transposed; dW a masked grouped product."""

    name = "grouped"
    operation = masked_grouped_mm
    rank = 3
    is_split = True

    def computes(self, node: fx.Node) -> bool:
        return str(node.target) == BACKWARD and len(node.args) == 4

    def extents(self, node: fx.Node, result: fx.Node) -> Iterable[Any]:
        return *sizes(node.args[0]), sizes(result)[-1]

    def mask(self, node: fx.Node, extra: Extra, mark: Mark) -> None:
        x, weight, offs, grad_out = node.args
        dx, dw = output_of(node, 0), output_of(node, 1)
        assert dw is not None
        if dx is not None:
            forward = torch.ops.transformers.grouped_mm_fallback.default  # beside its backward, so it is there
            replace_node(dx, forward, (grad_out, _permuted(dx, weight, [0, 2, 1]), offs), contiguous=True)
        if is_transposed(node):
            call = (_permuted(dw, grad_out, [1, 0]), x, offs, *extra, *mark.transposed.arguments())
            product = call_before(dw, self.operation, call, dw.meta["val"].permute([0, 2, 1]))
            replace_node(dw, aten.permute.default, (product, [0, 2, 1]))
        else:
            call = (_permuted(dw, x, [1, 0]), grad_out, offs, *extra, *mark.arguments())
            replace_node(dw, self.operation, call, contiguous=True)
        node.graph.erase_node(node)


def is_transposed(node: fx.Node) -> bool:
    """Whether the dW of experts' backward, [E, K, N], lies in memory as [E, N, K]: it lies as the weights do."""
    _, rows, columns = map(hint, node.meta["val"][1].stride())
    return rows < columns


def _permuted(node: fx.Node, matrix: Any, order: list[int]) -> fx.Node:
    """A view, in front of `node`."""
    return call_before(node, aten.permute.default, (matrix, order), matrix.meta["val"].permute(order))
