"""Convolutions of any rank, with groups, strides and dilation, transposed ones too."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from cacompile.kernels import masked_conv_dw

from ..marks import MARK, Mark
from ..nodes import output_of, sizes
from .base import Extra, Kind, replace_node

aten = torch.ops.aten


class Convolution(Kind):
    """The data gradient stays with the operation, the weight gradient leaves, the bias gradient becomes a sum.

    CPU libraries compute the whole weight gradient whenever they are asked for that of the bias.
    """

    name = "convolution"
    operation = masked_conv_dw
    unit_name = "filters"
    is_split = True

    def computes(self, node: fx.Node) -> bool:
        return node.target is aten.convolution_backward.default

    def extents(self, node: fx.Node, result: fx.Node) -> Iterable[Any]:
        grad_out, x, *_, transposed, _output_padding, _groups, _mask = node.args
        batch, _channels, *pixels = sizes(x if transposed else grad_out)
        return *sizes(result), batch, *pixels

    def unfit(self, node: fx.Node, dim: int, inner: int) -> str | None:
        *_, transposed, _output_padding, groups, _mask = node.args
        if transposed and groups != 1:
            return f"transposed convolution with {groups} groups"
        if dim != int(bool(transposed)) or inner != 1:
            return "filters lie along another dimension of the convolution's weight"
        return None

    def unit(self, node: fx.Node, rows: int) -> int:
        groups: Any = node.args[9]
        return rows // groups if groups != 1 else 1

    def no_kernel(self, node: fx.Node) -> str | None:
        _, x, *_, transposed, _output_padding, _groups, _mask = node.args
        if transposed or len(sizes(x)) > 4:
            return "no kernel under CUDA graphs for transposed or 3-D convolutions"
        return super().no_kernel(node)

    def mask(self, node: fx.Node, extra: Extra, mark: Mark) -> None:
        grad_out, x, weight, bias_sizes, *settings, (needs_dx, _, _) = node.args
        dw, db = output_of(node, 1), output_of(node, 2)
        assert dw is not None
        dw.meta[MARK] = mark
        replace_node(dw, self.operation, (grad_out, x, weight, *extra, *mark.only, *settings))
        if db is not None:
            pixels = [dim for dim in range(grad_out.meta["val"].dim()) if dim != 1]
            replace_node(db, aten.sum.dim_IntList, (grad_out, pixels))
        if needs_dx:
            node.args = (grad_out, x, weight, bias_sizes, *settings, [True, False, False])
            node.meta = {key: value for key, value in node.meta.items() if key != MARK}
            node.meta["val"] = (node.meta["val"][0], None, None)
        else:
            node.graph.erase_node(node)
