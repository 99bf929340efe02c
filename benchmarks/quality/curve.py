"""What a quality is worth: the cost of the dense runs that reach it. Pure functions of numbers."""

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


def frontier(costs: Sequence[float], qualities: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """(costs, qualities), both rising, of the runs that are better than all that cost no more."""
    best, kept = -np.inf, []
    for at in sorted(range(len(costs)), key=lambda i: (costs[i], -qualities[i])):
        if qualities[at] > best:
            best = qualities[at]
            kept.append(at)
    return np.asarray(costs, float)[kept], np.asarray(qualities, float)[kept]


def worth(costs: Sequence[float], qualities: Sequence[float], quality: float, cost: float) -> Worth:
    """Cost at which the frontier of the dense runs reaches `quality`, over `cost`; between its runs it is straight."""
    reached, levels = frontier(costs, qualities)
    if quality > levels[-1]:
        return Worth(float(reached[-1]) / cost, "at least")
    if quality < levels[0]:
        return Worth(float(reached[0]) / cost, "below")
    return Worth(float(np.interp(quality, levels, reached)) / cost)


class Arms(NamedTuple):
    """An arm beside the dense runs of the same seeds; all float [seeds] or [seeds, dense runs]."""

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


def mean_and_error(values: np.ndarray, form: str) -> str:
    """Mean ± standard error, each in `form`; of one value that."""
    error = standard_error(values)
    return form.format(values.mean()) + ("" if np.isnan(error) else f" ± {form.format(error)}")


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """Of the mean; NaN of one value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")
