"""What makes a weight gradient, what it costs and where it goes."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from cacompile.torch_internals import opname

from .flops import Flops
from .kinds import kind_called, kind_of
from .nodes import numel, output_of, sizes
from .plan import Param, Product, WeightGrad

aten = torch.ops.aten

SCATTERS = {"index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate", "embedding_dense_backward"}
SCATTERS |= {"_embedding_bag_backward", "_embedding_bag_dense_backward"}
"""Names of operations that add up rows where they were looked up."""

_VIEWS = {aten.view.default, aten.reshape.default, aten.permute.default, aten.unsqueeze.default, aten.clone.default}


def kind_and_flops(result: fx.Node) -> tuple[str, Flops] | None:
    """Kind and FLOPs (two a multiply-add) of the product whose result this is; None if it is none that makes a dW."""
    node = producer_of(result)
    kind = kind_of(node) if isinstance(node, fx.Node) else None
    if kind is None or kind.is_split != (node is not result):
        return None
    return kind.name, Flops.of(kind.extents(node, result))


def is_split(node: fx.Node) -> bool:
    """Whether a node computes dX, dW and more at once, so that its dW has to be taken out of it."""
    kind = kind_of(node)
    return kind is not None and kind.is_split


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


def producer_of(result: fx.Node) -> Any:
    """The node that computes a dW: another where dW is one of its outputs."""
    return result.args[0] if result.target is operator.getitem and result.args[1] == 1 else result


def result_of(node: fx.Node) -> fx.Node | None:
    """The dW that a node computes; None if nobody asks for it."""
    return output_of(node, 1) if is_split(node) else node


def make_grad(param: Param, products: tuple[Product, ...], dim: int) -> WeightGrad:
    """The gradient that these products make, in blocks along `dim`; its kind is that of most of them."""
    kinds = [product.kind for product in products]
    unit = max(kind_called(product.kind).unit(product.node, product.hi) for product in products)
    return WeightGrad(param, products, max(kinds, key=kinds.count), dim, unit)


def no_kernel(product: Product) -> str | None:
    """Why no kernel skips it by flags on a GPU alone: its operation would compute everything there, then mask it."""
    kind = kind_of(product.node)
    return None if kind is None else kind.no_kernel(product.node)


def follows_dense(grad: WeightGrad) -> str:
    """Why a gradient without products of its own stays dense."""
    return f"made by the product of {grad.follows}, which stays dense"
