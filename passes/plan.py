"""The shared nouns: what a pass finds out about one compiled graph. Frozen, no behaviour beyond arithmetic."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import fx

from cacompile.errors import renamed
from cacompile.layout import ParamFamily, ParamGroup, Share, Slice, StaysDense, gone_with

__all__ = [
    "GoneNode",
    "Param",
    "ParamFamily",
    "ParamGroup",
    "Plan",
    "Product",
    "Share",
    "SharedAxis",
    "Slice",
    "StaysDense",
    "StepCosts",
    "WeightGrad",
    "without_nodes",
]


@dataclass(frozen=True, slots=True)
class GoneNode:
    """What is left of a node in a plan without its graph: its name."""

    name: str


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter as the graph sees it."""

    name: str
    """As users know it: `layers.3.mlp.up.weight`."""
    index: int
    """Position among the inputs of Dynamo's graph."""
    shape: tuple[int, ...]
    placeholder: fx.Node
    grad: fx.Node | None
    """Node of the joint graph that is returned as its gradient."""
    opaque: str = ""
    """Why its blocks are not the graph's, where it is of a tensor subclass: the graph has only the tensors inside."""
    share: Share | None = None
    """What this rank has of it, where the graph has that alone, as under tensor parallel; `shape` is of the share."""

    def cut_along(self, dim: int) -> Share | None:
        """The share, where the parameter is cut along this dimension: then each rank has rows of its own there."""
        return self.share if self.share is not None and self.share.dim == dim else None


@dataclass(frozen=True, slots=True)
class Product:
    """One matmul or convolution that makes rows `lo:hi` of a parameter's gradient.

    Those rows lie along dimension `dim` of the product's result, `inner` neighbouring entries for each row.
    """

    node: fx.Node
    kind: str
    dim: int
    inner: int
    lo: int
    hi: int
    flops: int


@dataclass(frozen=True, slots=True)
class WeightGrad:
    """A gradient that can be masked: every product that is summed or joined into it, and how its rows are blocked."""

    param: Param
    products: tuple[Product, ...]
    kind: str
    dim: int
    """Dimension of the parameter along which it is cut into blocks."""
    unit: int = 1
    """Rows that cannot be parted: the output channels of one convolution group."""
    block: int = 0
    """Rows a block, the last one may be smaller; 0 until `group` has chosen."""
    first_flag: int = 0
    """Index of its first block among all blocks of the graph."""
    groups: tuple[int, ...] = ()
    """For each block, which of the plan's groups it belongs to."""
    follows: str = ""
    """The weight whose product makes this gradient as well, such as that of a standardized weight's gain: masked with
    it, at no cost of its own; empty for a gradient with products of its own."""
    others: tuple[WeightGrad, ...] = ()
    """The same gradient, to be cut along other dimensions; empty once `group` has chosen."""

    @property
    def blocks(self) -> int:
        return -(-self.param.shape[self.dim] // self.block)

    @property
    def block_flops(self) -> tuple[int, ...]:
        """dW FLOPs of each block in one backward."""
        rows = self.param.shape[self.dim]
        starts = range(0, rows, self.block)
        each = [sum(p.flops // (p.hi - p.lo) for p in self.products if p.lo <= start < p.hi) for start in starts]
        return tuple(flops * (min(start + self.block, rows) - start) for start, flops in zip(starts, each))

    @property
    def flops(self) -> int:
        return sum(p.flops for p in self.products)


@dataclass(frozen=True, slots=True)
class SharedAxis:
    """An axis that several dimensions of parameters have in common."""

    kind: str
    """As of a family; `stream` for one along which layers add their outputs; empty where it has no name."""
    size: int
    members: tuple[tuple[str, int], ...]
    """(parameter, dimension) pairs, in the graph's order."""
    family: int = -1
    """Index among the plan's families of one that its units are; -1: it owns nothing."""


@dataclass(frozen=True, slots=True)
class StepCosts:
    """FLOPs of all matrix products, convolutions and attention of a joint graph.

    What recomputing activations adds is not part of them. Operations without a formula count nothing, as everywhere.
    """

    step: int = 0
    """Forward pass, dX and dW."""
    forward: int = 0
    backward: tuple[int, ...] = ()
    """Of each product of the backward, dX or dW."""
    needed: tuple[tuple[int, int], ...] = ()
    """(position of an input of Dynamo's graph, the products that its gradient needs: bit i for the i-th)."""

    def left_out(self, positions: Collection[int]) -> int:
        """FLOPs of what only the gradients of these inputs need."""
        return sum(self.backward[i] for i in gone_with(self.needed, positions))


_RENAMED = {"cuts": "untraced", "guarded": "masked", "skips": "dense"}


@dataclass(frozen=True)
class Plan:
    """What is known of one compiled graph; each pass returns a fuller one."""

    params: tuple[Param, ...] = ()
    grads: tuple[WeightGrad, ...] = ()
    groups: tuple[ParamGroup, ...] = ()
    families: tuple[ParamFamily, ...] = ()
    axes: tuple[SharedAxis, ...] = ()
    """The coupling of the parameters' dimensions, from which the groups were made."""
    dense: tuple[StaysDense, ...] = ()
    uncounted: tuple[str, ...] = ()
    """Parameters of whose dW FLOPs some are inside operations that nobody can look into; those found are counted."""
    untraced: tuple[tuple[str, int], ...] = ()
    """What the search for groups could not follow, and how often."""
    costs: StepCosts = StepCosts()
    """Of a whole step of this graph."""
    nodes: int = 0
    """Nodes of the joint graph."""
    analysis_s: float = 0.0
    """Seconds that finding all this took."""
    masked: tuple[str, ...] | None = None
    """Parameters whose products the masked version masks; None until that version was made."""

    def __getattr__(self, name: str) -> Any:
        if name not in _RENAMED:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        renamed(f"Plan.{name}", f"Plan.{_RENAMED[name]}")
        return getattr(self, _RENAMED[name])

    @property
    def blocks(self) -> int:
        """Blocks of all gradients: flags of the masked version."""
        return sum(grad.blocks for grad in self.grads)

    @cached_property
    def flops_by_param(self) -> dict[str, int]:
        """dW FLOPs of one backward, masked or not."""
        return {s.param: s.flops for s in self.dense} | {g.param.name: g.flops for g in self.grads}

    @cached_property
    def flops(self) -> int:
        """dW FLOPs of one backward of the whole graph."""
        return sum(self.flops_by_param.values())


def without_nodes(plan: Plan) -> Plan:
    """The plan with names in place of nodes, so that it can be pickled, and keeps no graph."""

    def gone(node: Any) -> Any:
        return None if node is None else GoneNode(node.name)

    params = [replace(of, placeholder=gone(of.placeholder), grad=gone(of.grad)) for of in plan.params]
    same = dict(zip(map(id, plan.params), params))

    def grad(of: WeightGrad) -> WeightGrad:
        products = tuple(replace(product, node=gone(product.node)) for product in of.products)
        return replace(of, param=same[id(of.param)], products=products, others=tuple(map(grad, of.others)))

    return replace(plan, params=tuple(params), grads=tuple(map(grad, plan.grads)))
