"""What is counted of one parameter: FLOPs of its gradient's blocks, and its share of those of whole steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .spent import Spent


class ParamCounts:
    """The part of a parameter's state that counts, of all graphs that it is in."""

    if TYPE_CHECKING:
        step: int

        @property
        def blocks(self) -> int: ...
        @property
        def flops(self) -> np.ndarray: ...

    def __init__(self) -> None:
        self.spent: list[Spent] = []
        self._costs: list[tuple[Spent, np.ndarray]] = []
        """Of each graph: int64 [monomials, blocks], dW FLOPs for one of each monomial that it has counted."""
        self._carried: np.ndarray | None = None
        """int64 [blocks]: dW FLOPs that were counted before a saved state was loaded."""
        self._carried_step = 0
        self.counted_from = 0
        """The optimizer step after which counting began."""

    @property
    def counted(self) -> np.ndarray:
        """int64 [blocks]: dW FLOPs, with the sizes of each call, that dense backwards would have taken so far."""
        here = self.counted_here
        return here if self._carried is None else here + self._carried

    @property
    def counted_here(self) -> np.ndarray:
        """int64 [blocks]: the same, without what a loaded state brought along."""
        total = np.zeros(self.blocks, np.int64)
        for spent, coefficients in self._costs:
            for size, each in zip(spent.sizes, coefficients):
                total += size * each
        return total

    @property
    def step_counted(self) -> int:
        """FLOPs of whole dense steps so far, as far down as they went: a graph's are shared out evenly among the
        parameters that it parts."""
        return self._carried_step + self._step_counted_here

    @property
    def _step_counted_here(self) -> int:
        return sum(spent.share for spent in self.spent)

    def costs(self, spent: Spent, coefficients: np.ndarray) -> None:
        """One more graph computes its gradient. coefficients: int64 [monomials, blocks], of dW."""
        self._costs.append((spent, coefficients))

    def count(self) -> None:
        """Bring `flops` up to date: the mean of all steps, or one backward as compiled where nothing has run yet."""
        counted = self.counted
        if counted.any():
            self.flops[:] = counted / max(1, self.step - self.counted_from)

    def carry(self, counted: np.ndarray, step_counted: int) -> None:
        """Another state is taken over: what has run in this process before counts no more."""
        self._carried = counted - self.counted_here
        self._carried_step = step_counted - self._step_counted_here

    def count_anew(self) -> None:
        """Nothing of a state that was loaded counts."""
        self._carried, self._carried_step, self.counted_from = None, 0, self.step
