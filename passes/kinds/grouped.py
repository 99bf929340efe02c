"""Grouped matrix products: each expert's over its own tokens, which lie together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from cacompile.kernels import masked_grouped_mm

from ..marks import Mark
from ..nodes import sizes
from .base import Extra, Kind, replace_node


class Grouped(Kind):
    """dw = _grouped_mm(dy_t, x, offs) -> masked_grouped_mm(dy_t, x, offs, flags, host, first_flags, blocks)"""

    name = "grouped"
    operation = masked_grouped_mm
    rank = 3

    def computes(self, node: fx.Node) -> bool:
        """[M, S] x [S, N] -> [E, M, N], and nothing more."""
        if node.target is not torch.ops.aten._grouped_mm.default or len(node.args) != 3 or node.kwargs:
            return False
        return all(len(sizes(matrix)) == 2 for matrix in node.args[:2])

    def extents(self, node: fx.Node, result: fx.Node) -> Iterable[Any]:
        return *sizes(result.args[0]), sizes(result)[-1]

    def mask(self, node: fx.Node, extra: Extra, mark: Mark) -> None:
        replace_node(node, self.operation, (*node.args, *extra, *mark.arguments()), contiguous=True)
