"""Batched matrix products: of stacked experts and heads, each with as many rows as the others."""

from __future__ import annotations

import torch
from torch import fx

from cacompile.kernels import masked_bmm

from ..nodes import hint, numel, sizes
from .base import Kind


class Batched(Kind):
    """dw = bmm(dy_t, x) -> masked_bmm(dy_t, x, flags, host, first_flags, blocks)"""

    name = "batched"
    operation = masked_bmm
    rank = 3

    def computes(self, node: fx.Node) -> bool:
        return node.target is torch.ops.aten.bmm.default

    def flops(self, node: fx.Node, result: fx.Node) -> int:
        return 2 * numel(result) * hint(sizes(result.args[0])[-1])
