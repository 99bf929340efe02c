"""Small graphs, built by hand, with the shapes that passes look at."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from cacompile.passes import group, locate, mark_products, mask_weight_grads
from cacompile.passes.plan import Param, Plan, Product, WeightGrad

aten = torch.ops.aten

FLAGS = torch.tensor([1, 0, 0, 1], dtype=torch.uint8)
"""Of blocks of 16 rows."""


class Tiny:
    """A graph under construction; every node knows the shape of its value."""

    def __init__(self) -> None:
        self.graph = fx.Graph()

    def input(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = torch.empty(shape, dtype=dtype, device="meta")
        return node

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        value = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        node.meta["val"] = value.to("meta") if isinstance(value, torch.Tensor) else value
        return node

    def t(self, node: fx.Node) -> fx.Node:
        return self.call(aten.permute.default, node, [1, 0])

    def mm(self, a: fx.Node, b: fx.Node) -> fx.Node:
        return self.call(aten.mm.default, a, b)

    def returns(self, *outputs: fx.Node | None) -> fx.GraphModule:
        self.graph.output(outputs)
        return fx.GraphModule({}, self.graph)


def param(grad: fx.Node | None, *shape: int, name: str = "w", index: int = 0) -> Param:
    """A parameter with this gradient; its placeholder plays no part in what is looked at."""
    shape = shape or tuple(grad.meta["val"].shape)  # type: ignore[union-attr]
    return Param(name, index, shape, grad, grad)  # type: ignore[arg-type]


def located(grad: fx.Node, *shape: int) -> Plan:
    """What `locate` makes of one gradient that the graph returns."""
    grad.graph.output((grad,))
    return locate(Plan(params=(param(grad, *shape),)))


def found(plan: Plan) -> WeightGrad:
    assert plan.dense == (), plan.dense
    [grad] = plan.grads
    return grad


def reason(plan: Plan) -> str:
    assert plan.grads == ()
    [skip] = plan.dense
    return skip.reason


def marked_mm() -> tuple[fx.GraphModule, Plan]:
    """dw = mm(dy_t, x) of a weight [64, 32], planned in blocks of 16 rows, next to a dX that nobody may touch."""
    tiny = Tiny()
    dy, x, w = tiny.input("dy", 8, 64), tiny.input("x", 8, 32), tiny.input("w", 64, 32)
    dy_t = tiny.t(dy)
    dw, dx = tiny.mm(dy_t, x), tiny.mm(dy, w)
    return _marked(tiny, dw, [dx])


def marked_conv(*, needs_dx: bool = True, bias: bool = True) -> tuple[fx.GraphModule, Plan]:
    """dx, dw, db of a convolution with 32 filters, planned in blocks of 16."""
    tiny = Tiny()
    dy, x, w = tiny.input("dy", 2, 32, 6, 6), tiny.input("x", 2, 4, 8, 8), tiny.input("w", 32, 4, 3, 3)
    settings = [32] if bias else None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [needs_dx, True, bias]
    conv = tiny.call(aten.convolution_backward.default, dy, x, w, *settings)
    dx, dw, db = (
        tiny.call(operator.getitem, conv, i) if wanted else None for i, wanted in enumerate([needs_dx, True, bias])
    )
    return _marked(tiny, dw, [dx, db], block_rows=32)  # of filters, half as many


def _marked(
    tiny: Tiny, dw: fx.Node, others: Sequence[fx.Node | None], block_rows: int = 16
) -> tuple[fx.GraphModule, Plan]:
    gm = tiny.returns(dw, *others)
    plan = group(locate(Plan(params=(param(dw),))), block_rows=block_rows)
    mark_products(plan)
    return gm, plan


def copied(gm: fx.GraphModule) -> fx.Graph:
    return copy.deepcopy(gm.graph)


def on(rows: int) -> torch.Tensor:
    return FLAGS.repeat_interleave(16)[:rows].bool()


def where(product: Product) -> tuple[int, int, int, int]:
    return product.dim, product.inner, product.lo, product.hi


def by_hand(tiny: Tiny, grad: fx.Node, dim: int, *others: fx.Node) -> tuple[fx.GraphModule, Plan]:
    """A graph that returns this gradient, and its plan in blocks of 2 along `dim`."""
    gm = tiny.returns(grad, *others)
    [found] = locate(Plan(params=(param(grad),))).grads
    [found] = [cut for cut in (found, *found.others) if cut.dim == dim]
    plan = Plan(grads=(replace(found, block=2, first_flag=3, others=()),))
    mark_products(plan)
    return gm, plan


Graphs = tuple[fx.Graph, fx.GraphModule]


def masked(make: Callable[[], tuple], host: bool = False) -> Graphs:
    gm, plan = make()
    before = copied(gm)
    assert mask_weight_grads(gm, plan, host).masked == ("w",)
    return before, gm


def node_of(gm: fx.GraphModule, target: object) -> fx.Node:
    return next(node for node in gm.graph.nodes if node.target is target)
