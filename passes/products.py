"""What makes a weight gradient, what it costs and where it goes."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from cacompile.kernels.blocks import KERNEL_DTYPES
from cacompile.plan import Param, Product, WeightGrad

aten = torch.ops.aten
_MATMULS = {aten.mm.default: "linear", aten.bmm.default: "batched"}

EXPERTS_BACKWARD = "transformers.grouped_mm_fallback_backward.default"
"""As text, because nobody needs transformers: (x [S, K], w [E, K, N], offs [E], dy [S, N]) -> (dx, dw)."""

SCATTERS = {"index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate", "embedding_dense_backward"}
SCATTERS |= {"_embedding_bag_backward", "_embedding_bag_dense_backward"}
"""Names of operations that add up rows where they were looked up."""

_VIEWS = {aten.view.default, aten.reshape.default, aten.permute.default, aten.unsqueeze.default, aten.clone.default}


def kind_and_flops(result: fx.Node) -> tuple[str, int] | None:
    """Kind and FLOPs (two a multiply-add) of the product whose result this is; None if it is none that makes a dW."""
    if kind := _MATMULS.get(result.target):
        return kind, 2 * numel(result) * hint(sizes(result.args[0])[-1])
    if is_grouped(result):
        return "grouped", 2 * numel(result.args[0]) * hint(sizes(result)[-1])
    source = source_of(result)
    if isinstance(source, fx.Node) and source is not result and is_split(source):
        if source.target is not aten.convolution_backward.default:
            return "grouped", 2 * numel(source.args[0]) * hint(sizes(result)[-1])
        grad_out, x, *_, transposed, _output_padding, _groups, _mask = source.args
        batch, _channels, *pixels = map(hint, sizes(x if transposed else grad_out))
        return "convolution", 2 * numel(result) * batch * math.prod(pixels)
    return None


def is_split(node: fx.Node) -> bool:
    """Whether a node computes dX, dW and more at once, so that its dW has to be taken out of it."""
    return node.target is aten.convolution_backward.default or is_experts(node)


def is_experts(node: fx.Node) -> bool:
    return str(node.target) == EXPERTS_BACKWARD and len(node.args) == 4


def is_transposed(experts: fx.Node) -> bool:
    """Whether the dW of experts' backward, [E, K, N], lies in memory as [E, N, K]: it lies as the weights do."""
    _, rows, columns = map(hint, experts.meta["val"][1].stride())
    return rows < columns


def is_grouped(node: fx.Node) -> bool:
    """Whether a node is [M, S] x [S, N] -> [E, M, N], each expert's product over its own tokens, and nothing more."""
    if node.target is not aten._grouped_mm.default or len(node.args) != 3 or node.kwargs:
        return False
    return all(len(sizes(matrix)) == 2 for matrix in node.args[:2])


def is_gathered(node: fx.Node) -> bool:
    """Whether a node adds up outer products, one a token, each where the token's weights had been looked up."""
    if opname(node) not in SCATTERS or len(node.args) < 3:
        return False
    values: Any = node.args[2]
    while isinstance(values, fx.Node) and values.target in _VIEWS:
        values = values.args[0]
    if not isinstance(values, fx.Node) or values.target is not aten.mul.Tensor or len(sizes(values)) < 3:
        return False
    return all(isinstance(a, fx.Node) and 1 < numel(a) < numel(values) for a in values.args[:2])


def source_of(result: fx.Node) -> Any:
    """The node that computes a dW: another where dW is one of its outputs."""
    return result.args[0] if result.target is operator.getitem and result.args[1] == 1 else result


def output_of(node: fx.Node, index: int) -> fx.Node | None:
    return next((user for user in node.users if user.target is operator.getitem and user.args[1] == index), None)


def result_of(node: fx.Node) -> fx.Node | None:
    """The dW that a node computes; None if nobody asks for it."""
    return output_of(node, 1) if is_split(node) else node


def make_grad(param: Param, products: tuple[Product, ...], dim: int) -> WeightGrad:
    """The gradient that these products make, cut along `dim`; its kind is that of most of them."""
    kinds = [product.kind for product in products]
    return WeightGrad(param, products, max(kinds, key=kinds.count), dim, max(map(_unit, products)))


def _unit(product: Product) -> int:
    """Rows of a product that cannot be parted."""
    groups: Any = product.node.args[9] if product.kind == "convolution" else 1
    return product.hi // groups if groups != 1 else 1


def no_kernel(product: Product) -> str | None:
    """Why no kernel skips it by flags on a GPU alone: its operation would compute everything there, then mask it."""
    node = product.node
    value = node.meta["val"][1] if is_split(node) else node.meta["val"]
    if product.kind == "convolution":
        _, x, *_, transposed, _output_padding, _groups, _mask = node.args
        if transposed or len(sizes(x)) > 4:
            return "no kernel under CUDA graphs for transposed or 3-D convolutions"
    return None if value.dtype in KERNEL_DTYPES else f"no kernel under CUDA graphs for {value.dtype}"


def follows_dense(grad: WeightGrad) -> str:
    """Why a gradient without products of its own stays dense."""
    return f"made by the product of {grad.follows}, which stays dense"


def opname(node: fx.Node) -> str:
    return getattr(node.target, "_opname", "")


def sizes(node: Any) -> tuple[Any, ...]:
    """Sizes of a node's result, dynamic ones as they are."""
    return tuple(node.meta["val"].shape)


def hint(size: Any) -> int:
    """The size seen when compiling, also of a dynamic dimension."""
    return size if isinstance(size, int) else size.node.hint or 1


def uses(node: fx.Node) -> int:
    """How often a node is used; `node.users` counts an output that returns it in two places once."""
    return sum(_times(node, user) for user in node.users)


def reached(node: fx.Node) -> list[fx.Node]:
    """A node and all that is computed from it, the graph's output excluded."""
    seen, waiting = {node: None}, [node]
    while waiting:
        for user in waiting.pop().users:
            if user.op != "output" and user not in seen:
                seen[user] = None
                waiting.append(user)
    return list(seen)


def exits(node: fx.Node) -> list[int]:
    """The places of the graph's output in which something appears that is computed from this node."""
    found = set(reached(node))
    return [place for place, value in enumerate(node.graph.output_node().args[0]) if value in found]


def _times(node: fx.Node, user: fx.Node) -> int:
    if user.op == "output":  # flat in the graphs of AOTAutograd, and long: not leaf by leaf
        return list(user.args[0]).count(node)
    return tree_leaves((user.args, user.kwargs)).count(node)


def numel(node: Any) -> int:
    return math.prod(map(hint, sizes(node)))
