"""What one graph with one set of parameters has spent: FLOPs of steps and of dW, and those that were not needed."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence

import numpy as np

from cacompile.layout import GradLayout, MaskLayout, Monomial

from .params import ParamState
from .spent import Spent


class GraphCounts:
    """A graph's gradients with the states of their parameters, and the count of what its passes cost."""

    def __init__(self, layout: MaskLayout, params: Sequence[ParamState | None]) -> None:
        """params: of the layout's gradients; None where one has no blocks in this graph."""
        self._layout = layout
        self._params = params
        self.spent = Spent(parted=max(1, len(self.params)))
        for param in self.params:
            param.spent.append(self.spent)
        self.cut: frozenset[int] = frozenset()
        """Positions of the inputs whose gradients were None in the last backward, which ended above what only they
        need."""
        self._gone_with: dict[frozenset[int], tuple[tuple[float, ...], tuple[int, ...]]] = {}

    @property
    def params(self) -> list[ParamState]:
        """The states of its parameters that have blocks in this graph."""
        return [param for param in self._params if param is not None]

    @property
    def skippable(self) -> list[ParamState]:
        """Those of which this graph leaves out what is off; before its masked version is made, as planned."""
        return [param for grad, param in self._pairs() if param is not None and self._masks(grad)]

    @property
    def masked_backwards(self) -> int:
        return self.spent.masked

    @property
    def mean_sizes(self) -> dict[Monomial, float]:
        """What the layout's monomials were in a backward, on average; empty where they are as compiled."""
        if not self._layout.sources or not self.spent.backwards:
            return {}
        return {m: total / self.spent.backwards for m, total in zip(self._layout.monomials, self.spent.sizes)}

    @property
    def flops_by_param(self) -> dict[str, int]:
        """dW FLOPs of a backward, on average; as compiled before the first."""
        sizes = list(self.mean_sizes.values())
        if not sizes:
            return dict(self._layout.flops_by_param)
        counts = self._layout.coefficients_by_param
        return {name: round(sum(map(operator.mul, sizes, each))) for name, each in counts}

    def count_backward(self, sizes: Sequence[int]) -> None:
        """A backward runs. sizes: what the layout's monomials are in this call."""
        spent = self.spent
        if not spent.backwards:
            self._begin_to_count()
        for i, size in enumerate(sizes):
            spent.sizes[i] += size
            spent.total += size * self._layout.coefficients[i]
            spent.forward += size * self._layout.step.forward[i]
        spent.add_step(sum(map(operator.mul, sizes, self._layout.step.coefficients)))
        spent.backwards += 1

    def count_forward(self) -> None:
        """It runs forward, and no backward will come: at the mean sizes of those so far, or as compiled."""
        layout, spent = self._layout, self.spent
        flops = layout.step.compiled[0]
        if spent.backwards:
            flops = sum(map(operator.mul, spent.sizes, layout.step.forward)) / spent.backwards
        spent.forward += flops
        spent.add_step(flops)

    def count_cut(self, sizes: Sequence[int], positions: frozenset[int]) -> None:
        """That backward ends where only the gradients of these inputs, by position, lie below: what it does not count.

        sizes: as of `count_backward`.
        """
        self.cut = positions
        if positions:
            step, dw = self._gone(positions)
            self.spent.add_step(-sum(map(operator.mul, sizes, step)))
            self.spent.total -= sum(map(operator.mul, sizes, dw))

    def _gone(self, positions: frozenset[int]) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """What of the step's FLOPs, and of those of dW, goes with these gradients, to one of each monomial."""
        if positions not in self._gone_with:
            names = {name for name, index in self._layout.params if index in positions}
            dw = [each for name, each in self._layout.coefficients_by_param if name in names]
            none = (0,) * len(self._layout.monomials)
            self._gone_with[positions] = self._layout.step.left_out(positions), tuple(map(sum, zip(*dw))) or none
        return self._gone_with[positions]

    def in_this_step(self) -> tuple[float, float, float]:
        """FLOPs of forward and backward, those of dW, and those of dW that are skipped with this step's mask.

        Of all its backwards so far; of one, with the sizes seen when compiling, before the first.
        """
        layout, sizes = self._layout, self.spent.sizes
        if not self.spent.backwards:
            step, dw = float(layout.step.flops), float(layout.flops)
            costs = [np.array(grad.block_flops, float) for grad in layout.grads]
        else:
            gone_step, gone_dw = self._gone(self.cut)
            step = sum(n * (a - b) for n, a, b in zip(sizes, layout.step.coefficients, gone_step))
            dw = float(sum(n * (a - b) for n, a, b in zip(sizes, layout.coefficients, gone_dw)))
            costs = [np.array(sizes, float) @ np.array(grad.coefficients, float) for grad in layout.grads]
        skipped = sum(
            float(cost[~param.on & ~param.frozen_blocks].sum())
            for (grad, param), cost in zip(self._pairs(), costs)
            if param is not None and self._masks(grad)
        )
        return step, dw, skipped

    def _begin_to_count(self) -> None:
        """Now that the backward is there, which knows where it finds the sizes."""
        self.spent.sizes = [0] * len(self._layout.monomials)
        for grad, param in self._pairs():
            if param is not None:
                param.costs(self.spent, np.array(grad.coefficients, np.int64))

    def _pairs(self) -> Iterable[tuple[GradLayout, ParamState | None]]:
        return zip(self._layout.grads, self._params, strict=True)

    def _masks(self, grad: GradLayout) -> bool:
        return self._layout.masked is None or grad.param in self._layout.masked
