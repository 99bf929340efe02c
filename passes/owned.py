"""A family of groups in the making: one axis, and the rows of every parameter that it owns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .coupling.axes import Axis
from .kinds import kind_called
from .plan import Param, Share, WeightGrad


@dataclass
class Owned:
    """A future family: one axis with the slices that it owns."""

    kind: str
    leaf: Axis
    slices: list[tuple[WeightGrad, np.ndarray]] = field(default_factory=list)
    """Weights, and the unit of each row."""
    others: list[tuple[Param, int, np.ndarray]] = field(default_factory=list)
    """The same, with their dimension, of parameters whose gradients cost nothing: biases, norms, embeddings."""
    units: int = 1
    """Units a group."""
    first: int = 0
    """Its first group among all groups of the plan."""
    cut: Share | None = None
    """Which piece of a longer axis this is, where each rank has one; None: it is whole."""

    @property
    def groups(self) -> int:
        return -(-self.leaf.size // self.units)

    @property
    def thickest(self) -> int:
        """Neighbouring rows of one unit in the weight where they are most."""
        runs = [run(units) * inner_of(grad) for grad, units in self.slices]
        return max(runs, default=1)

    @property
    def least(self) -> int:
        """Units that cannot be parted: the output channels of one convolution group."""
        return max((-(-grad.unit // run(units)) for grad, units in self.slices), default=1)

    def may_have(self, units: int) -> bool:
        """Whether groups of so many units end where products and indivisible rows of its weights do, and the axis."""
        if self.cut is not None and self.leaf.size % units:
            return False
        for grad, each in self.slices:
            rows = units * run(each)
            if (np.diff(each) >= 0).all() and (rows % grad.unit or any(edge % rows for edge in edges_of(grad))):
                return False
        return True


def run(units: np.ndarray) -> int:
    """Length of the first stretch of rows that belong to one unit."""
    start = int(np.argmax(units >= 0))
    return int(np.argmax(np.append(units[start:], -2) != units[start]))


def run_lengths(units: np.ndarray) -> np.ndarray:
    """For each row, the length of the stretch of rows of one unit that it lies in."""
    lengths = np.diff(np.flatnonzero(np.concatenate(([True], np.diff(units) != 0, [True]))))
    return np.repeat(lengths, lengths)


def inner_of(grad: WeightGrad) -> int:
    """Rows or columns of the product that one row of the weight is; of an expert, those of its matrix."""
    return grad.param.shape[1] if is_batch(grad) else min(p.inner for p in grad.products)


def is_batch(grad: WeightGrad) -> bool:
    """Whether it is cut into whole matrices of a batched product."""
    return any(kind_called(p.kind).rank == 3 and p.dim == 0 for p in grad.products)


def edges_of(grad: WeightGrad) -> list[int]:
    """Rows at which one product ends and another begins."""
    rows = grad.param.shape[grad.dim]
    return sorted({edge for p in grad.products for edge in (p.lo, p.hi)} - {0, rows})
