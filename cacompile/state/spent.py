"""What one compiled graph has spent on weight gradients, with one set of parameters."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from .series import Series

if TYPE_CHECKING:
    from .params import ParamState


@dataclass(slots=True)
class Spent:
    """Counts of one graph with one set of parameters so far; outlives the graph in the parameters' states."""

    sizes: list[int] = field(default_factory=lambda: [0])
    """For each of the graph's monomials, the sum of what it was in all backwards; exact, however large."""
    total: float = 0.0
    """dW FLOPs that dense backwards would have taken."""
    saved: float = 0.0
    """dW FLOPs left out."""
    parted: int = 1
    """Parameters with blocks in the graph, among which its steps are shared out."""
    step: float = 0.0
    """FLOPs that dense forward and backward passes would have taken, the latter no farther down than they went."""
    share: int = 0
    """What of them falls to each of these parameters; whole, so that it adds up alike in a run that is resumed."""
    forward: float = 0.0
    """Those of them that forward passes took."""
    backwards: int = 0
    masked: int = 0
    """Backwards that ran the masked version."""
    started: float = field(default_factory=time.perf_counter)
    history: Series = field(default_factory=lambda: Series((6,), float))
    """At each measurement: the clock in seconds, then `counts`."""

    def add_step(self, flops: float) -> None:
        """A pass of so many FLOPs; less than 0: so many of those that were counted are not needed."""
        self.step += flops
        self.share += round(flops / self.parted)

    @property
    def counts(self) -> tuple[float, float, int, int, float]:
        return self.total, self.saved, self.backwards, self.masked, self.step


class Totals(NamedTuple):
    """What has been spent before a moment."""

    total: float = 0.0
    """dW FLOPs that a dense run would have spent."""
    saved: float = 0.0
    backwards: int = 0
    """Backward passes of compiled graphs."""
    masked: int = 0
    """Those that ran the masked version; the others ran Inductor's own."""
    step: float = 0.0
    """FLOPs that dense forward and backward passes would have taken."""
    forward: float = 0.0
    """Those of them that forward passes took; NaN where a state that was loaded does not know."""

    @classmethod
    def of(cls, params: Iterable[ParamState]) -> Totals:
        counts = [(*spent.counts, spent.forward) for spent in spent_by(params)]
        total, saved, backwards, masked, step, forward = map(sum, zip(*counts)) if counts else cls()
        return cls(total, saved, int(backwards), int(masked), step, forward)


def spent_by(params: Iterable[ParamState]) -> list[Spent]:
    """What graphs with any of these parameters have spent, each graph once."""
    return list({id(spent): spent for param in params for spent in param.spent}.values())


def add(a: Totals, b: Totals, sign: int = 1) -> Totals:
    total, saved, backwards, masked, step, forward = (x + sign * y for x, y in zip(a, b))
    return Totals(total, saved, int(backwards), int(masked), step, forward)
