"""What a quality is worth: the cost of the dense run that reaches it. Pure functions of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Worth(NamedTuple):
    """A ratio of costs, or what is known of it."""

    ratio: float
    bound: str = ""
    """"at least": better than the full dense run; "below": worse than the shortest. Neither is extrapolated."""

    def __str__(self) -> str:
        return {"": "", "at least": "≥ ", "below": "< "}[self.bound] + f"{self.ratio:.3f}"


def rising(values: Sequence[float]) -> np.ndarray:
    """The nearest values, in least squares, that never fall (pool adjacent violators)."""
    blocks: list[tuple[float, int]] = []  # (mean, how many)
    for value in values:
        blocks.append((float(value), 1))
        while len(blocks) > 1 and blocks[-2][0] >= blocks[-1][0]:
            (last, n), (before, m) = blocks.pop(), blocks.pop()
            blocks.append(((last * n + before * m) / (n + m), n + m))
    return np.concatenate([np.full(n, mean) for mean, n in blocks])


def worth(costs: Sequence[float], qualities: Sequence[float], quality: float, cost: float) -> Worth:
    """Cost of the cheapest dense run that reaches `quality`, over `cost`.

    costs, qualities: of the dense runs, costs rising. Between them the curve is straight; a longer dense run that came
    out worse than a shorter one is taken as noise, and the two are levelled.
    """
    levels = rising(qualities)
    if quality > levels[-1]:
        return Worth(costs[-1] / cost, "at least")
    if quality < levels[0]:
        return Worth(costs[0] / cost, "below")
    above = int(np.argmax(levels >= quality))
    if above == 0:
        return Worth(costs[0] / cost)
    share = (quality - levels[above - 1]) / (levels[above] - levels[above - 1])
    return Worth((costs[above - 1] + share * (costs[above] - costs[above - 1])) / cost)


class Arms(NamedTuple):
    """An arm beside the dense runs of the same seeds; all float [seeds] or [seeds, dense runs], cheapest first."""

    costs: np.ndarray
    qualities: np.ndarray
    cost: np.ndarray
    quality: np.ndarray

    def of(self, seeds: np.ndarray | list[int]) -> Arms:
        return Arms(*(values[seeds] for values in self))


def mean_worth(arms: Arms) -> Worth:
    """Of the mean over seeds against the mean dense runs."""
    return worth(arms.costs.mean(0), arms.qualities.mean(0), float(arms.quality.mean()), float(arms.cost.mean()))


def seed_worths(arms: Arms) -> list[Worth]:
    """Each seed against its own dense runs."""
    return [mean_worth(arms.of([seed])) for seed in range(len(arms.cost))]


def resampled(arms: Arms, draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
    """Interval of `mean_worth` over seeds drawn with replacement (bootstrap); bounded ratios count as their bound."""
    rng, seeds = np.random.default_rng(0), len(arms.cost)
    ratios = [mean_worth(arms.of(rng.integers(seeds, size=seeds))).ratio for _ in range(draws)]
    low, high = np.quantile(ratios, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Of the mean; NaN of one value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
