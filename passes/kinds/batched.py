"""Batched matrix products: of stacked experts and heads, each with as many rows as the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from cacompile.kernels import masked_bmm

from ..nodes import sizes
from .base import Kind


class Batched(Kind):
    """dw = bmm(dy_t, x) -> masked_bmm(dy_t, x, flags, host, first_flags, blocks)"""

    name = "batched"
    operation = masked_bmm
    rank = 3

    def computes(self, node: fx.Node) -> bool:
        return node.target is torch.ops.aten.bmm.default

    def extents(self, node: fx.Node, result: fx.Node) -> Iterable[Any]:
        return *sizes(result), sizes(result.args[0])[-1]
