"""What makes a weight gradient, what it costs and where it goes."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from cacompile.kernels.blocks import KERNEL_DTYPES
from cacompile.plan import Product

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


def no_kernel(product: Product) -> str | None:
    """Why no kernel skips it by flags on a GPU alone: its operation would compute everything there, then mask it."""
    value = product.node.meta["val"]
    if product.kind == "convolution":
        _, x, *_, transposed, _output_padding, _groups, _mask = product.node.args
        value = value[1]
        if transposed or len(sizes(x)) > 4:
            return "no kernel under CUDA graphs for transposed or 3-D convolutions"
    return None if value.dtype in KERNEL_DTYPES else f"no kernel under CUDA graphs for {value.dtype}"


def sizes(node: Any) -> tuple[Any, ...]:
    """Sizes of a node's result, dynamic ones as they are."""
    return tuple(node.meta["val"].shape)


def hint(size: Any) -> int:
    """The size seen when compiling, also of a dynamic dimension."""
    return size if isinstance(size, int) else size.node.hint or 1


def uses(node: fx.Node) -> int:
    """How often a node is used; `node.users` counts an output that returns it in two places once."""
    return sum(_times(node, user) for user in node.users)


def exits(node: fx.Node) -> int:
    """In how many places of the graph's output something appears that is computed from this node."""
    seen, waiting, found = {node}, [node], 0
    while waiting:
        now = waiting.pop()
        for user in now.users:
            if user.op == "output":
                found += _times(now, user)
            elif user not in seen:
                seen.add(user)
                waiting.append(user)
    return found


def _times(node: fx.Node, user: fx.Node) -> int:
    if user.op == "output":  # flat in the graphs of AOTAutograd, and long: not leaf by leaf
        return list(user.args[0]).count(node)
    return tree_leaves((user.args, user.kwargs)).count(node)


def _numel(node: Any) -> int:
    return math.prod(map(hint, sizes(node)))
