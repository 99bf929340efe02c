"""The shared nouns: what a pass finds out about one compiled graph. Frozen, no behaviour beyond arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import fx


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
    """Rows a block, the last one may be smaller; 0 until `group` has cut it."""
    slot: int = 0
    """Index of its first block among all blocks of the graph."""

    @property
    def blocks(self) -> int:
        return -(-self.param.shape[self.dim] // self.block)

    @property
    def flops(self) -> int:
        return sum(p.flops for p in self.products)


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows `start:stop` of a parameter along dimension `dim`."""

    param: str
    dim: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class ParamGroup:
    """Slices that are kept or skipped together."""

    name: str
    slices: tuple[Slice, ...]
    family: str
    flops: int
    """dW FLOPs of one backward; symbolic sizes count with the size seen when compiling."""


@dataclass(frozen=True, slots=True)
class Skip:
    """A parameter that stays dense, and why."""

    param: str
    kind: str
    reason: str
    flops: int = 0


@dataclass(frozen=True)
class Plan:
    """What is known of one compiled graph; each pass returns a fuller one."""

    params: tuple[Param, ...] = ()
    grads: tuple[WeightGrad, ...] = ()
    groups: tuple[ParamGroup, ...] = ()
    skips: tuple[Skip, ...] = ()
    guarded: tuple[str, ...] | None = None
    """Parameters whose products the guarded version masks; None until that version was made."""

    @cached_property
    def flops_by_param(self) -> dict[str, int]:
        """dW FLOPs of one backward, guarded or not."""
        return {s.param: s.flops for s in self.skips} | {g.param.name: g.flops for g in self.grads}

    @cached_property
    def flops(self) -> int:
        """dW FLOPs of one backward of the whole graph."""
        return sum(self.flops_by_param.values())
