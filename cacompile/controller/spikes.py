"""Spikes: measurements so far from what is usual that they must be seen twice before they open the gate."""

from __future__ import annotations

import numpy as np

JUMP = 4.0
"""How many times what is usual the descent of all groups is at most where nothing has gone wrong: a usual measurement
is within a fifth above. What is more, or slower by as much, must be seen twice before it opens the gate."""

EARLY = 4
"""Measurements after which a running mean has enough of them to tell a jump from what is usual."""


def was_spike(mean: np.ndarray, descent: np.ndarray, last: np.ndarray, *, early: bool) -> bool:
    """Whether the last measurement was a jump up of all groups together.

    mean, descent, last: float [G], expected descents usually, now and then. early: `mean` may know that jump alone.
    """
    then, now, usual = totals(mean, descent, last)
    return then > JUMP * (min(usual, now) if early else usual)


def totals(mean: np.ndarray, descent: np.ndarray, last: np.ndarray) -> tuple[float, float, float]:
    """(then, now, usually), of the groups of which all three are known."""
    known = np.isfinite(mean) & np.isfinite(descent) & np.isfinite(last)
    return float(last[known].sum()), float(descent[known].sum()), float(mean[known].sum())


def believed_ratio(ratio: np.ndarray, last: np.ndarray, *, spike: bool) -> np.ndarray:
    """The movement to go by, float [G]: of a group that has slowed down more than JUMP times, that of before.

    ratio, last: float [G], movement now and at the last measurement, NaN where not known. spike: the last one was a
    jump, and tells nothing.
    """
    return ratio if spike else np.where(np.isfinite(last) & (ratio < last / JUMP), last, ratio)
