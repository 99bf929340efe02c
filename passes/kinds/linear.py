"""Matrix products: of a linear layer, and of whatever AOTAutograd writes as one."""

from __future__ import annotations

import torch
from torch import fx

from cacompile.kernels import masked_mm

from ..nodes import hint, numel, sizes
from .base import Kind


class Linear(Kind):
    """dw = mm(dy_t, x) -> masked_mm(dy_t, x, flags, host, first_flags, blocks)"""

    name = "linear"
    operation = masked_mm

    def computes(self, node: fx.Node) -> bool:
        return node.target is torch.ops.aten.mm.default

    def flops(self, node: fx.Node, result: fx.Node) -> int:
        return 2 * numel(result) * hint(sizes(result.args[0])[-1])
