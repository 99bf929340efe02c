"""Matrix products: of a linear layer, and of whatever AOTAutograd writes as one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from cacompile.kernels import masked_mm

from ..nodes import sizes
from .base import Kind


class Linear(Kind):
    """dw = mm(dy_t, x) -> masked_mm(dy_t, x, flags, host, first_flags, blocks)"""

    name = "linear"
    operation = masked_mm

    def computes(self, node: fx.Node) -> bool:
        return node.target is torch.ops.aten.mm.default

    def extents(self, node: fx.Node, result: fx.Node) -> Iterable[Any]:
        return *sizes(result), sizes(result.args[0])[-1]
