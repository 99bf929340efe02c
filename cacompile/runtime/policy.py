"""How likely each group is kept, from how much loss its own gradient is expected to win per FLOP that it costs."""

from __future__ import annotations

import numpy as np

from cacompile.config import Config


def keep_probabilities(descent: np.ndarray, settled: np.ndarray, flops: np.ndarray, config: Config) -> np.ndarray:
    """Spend the tolerance where it saves most.

    A group is skipped with probability q = min(cap, u * flops / descent), cap = max_skip * settled: below its cap every
    group gives up the same expected descent per FLOP saved, u, and u is as large as the budget allows:
    sum(q * descent) <= tolerance * sum(descent).

    descent: float [G] >= 0, expected loss decrease per step, NaN where not known yet (never skipped);
    settled: float [G] in 0..1, how far a group has come down from the fastest that it ever moved;
    flops: float [G] (0: never skipped, it saves nothing). Returns float [G], the probability of being kept.
    """
    known = np.isfinite(descent) & (flops > 0.0)
    if config.tolerance == 0.0 or not known.any():
        return np.ones(len(descent))
    descent = np.where(known, descent, 0.0)
    cap = np.where(known, config.max_skip * np.clip(settled, 0.0, 1.0), 0.0)
    level = _water_level((cap * descent)[known], flops[known], config.tolerance * descent[known].sum())
    with np.errstate(divide="ignore", invalid="ignore"):
        skip = np.where(descent > 0.0, level * flops / descent, np.inf)
    return np.where(known, 1.0 - np.minimum(cap, skip), 1.0)


def _water_level(most: np.ndarray, flops: np.ndarray, budget: float) -> float:
    """Largest u with sum(min(most, u * flops)) <= budget; infinite if giving up the most of all stays within it."""
    if most.sum() <= budget:
        return np.inf
    order = np.argsort(most / flops)
    most, flops = most[order], flops[order]
    below = np.cumsum(most) - most  # given up by the groups that met their cap earlier
    rising = flops[::-1].cumsum()[::-1]  # FLOPs of the groups that have not
    spent = below + most / flops * rising  # in all, when u stands where a group meets its cap
    first = min(int(np.searchsorted(spent, budget)), len(spent) - 1)  # rounding may leave the last just below
    return float((budget - below[first]) / rising[first])
