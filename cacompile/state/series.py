"""Numbers over optimizer steps, in bounded memory on the host."""

from __future__ import annotations

import numpy as np


class Series:
    """One row of numbers at each step that is noted, thinned evenly as it grows.

    Only steps whose number of the measurement, `step // every`, is a multiple of `stride` are kept; the stride doubles
    whenever more than `limit` are: what is kept depends on the last step alone, not on where a run was interrupted.
    """

    def __init__(self, shape: tuple[int, ...], dtype: type) -> None:
        self.stride = 1
        self._count = 0
        self._steps = np.zeros(16, np.int64)
        self._rows: np.ndarray = np.zeros((16, *shape), dtype)

    @property
    def steps(self) -> np.ndarray:
        """int64 [P], rising."""
        return self._steps[: self._count]

    @property
    def rows(self) -> np.ndarray:
        """[P, ...], a row for each step."""
        return self._rows[: self._count]

    def wants(self, step: int, every: int) -> bool:
        return step // every % self.stride == 0

    def add(self, step: int, row: np.ndarray, *, every: int, limit: int) -> None:
        """Note a row; a second one of the same step takes the place of the first, one of an earlier step is dropped."""
        if not self.wants(step, every) or (self._count and step < self._steps[self._count - 1]):
            return
        if not self._count or step != self._steps[self._count - 1]:
            if self._count == len(self._steps):
                more = max(1, min(self._count, limit + 1 - self._count))
                self._steps = np.concatenate([self._steps, np.zeros(more, np.int64)])
                self._rows = np.concatenate([self._rows, np.zeros((more, *self._rows.shape[1:]), self._rows.dtype)])
            self._count += 1
        self._steps[self._count - 1] = step
        self._rows[self._count - 1] = row
        if self._count > limit:
            self.stride, kept = thin(self.steps, self.stride, every=every, limit=limit)
            steps, rows = self.steps[kept], self.rows[kept]
            self._count = len(steps)
            self._steps[: self._count], self._rows[: self._count] = steps, rows

    def at(self, steps: np.ndarray) -> np.ndarray:
        """The rows that were the last at these steps, float [len(steps), ...]; NaN before the first."""
        place = np.searchsorted(self.steps, steps, side="right") - 1
        if not self._count:
            return np.full((len(steps), *self._rows.shape[1:]), np.nan, self._rows.dtype)
        found = self.rows[np.maximum(place, 0)]
        found[place < 0] = np.nan
        return found


def thin(steps: np.ndarray, stride: int, *, every: int, limit: int) -> tuple[int, np.ndarray]:
    """(stride, bool [P] of the steps that stay), so that no more than `limit` do."""
    kept = steps // every % stride == 0
    while kept.sum() > limit:
        stride *= 2
        kept = steps // every % stride == 0
    return stride, kept
