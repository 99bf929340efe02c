"""The losses of a run that somebody has told of: for its report, in bounded memory on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .series import Series

POINTS = 512
"""Most losses that are kept."""


class Losses:
    """A loss at each step that has one; NaN and infinite ones are losses too."""

    def __init__(self) -> None:
        self._series = Series((), float)
        self._every = 1
        """Steps between the first two of them: what is thinned evenly."""

    @property
    def steps(self) -> np.ndarray:
        """int64 [losses]: optimizer steps done."""
        return self._series.steps.copy()

    @property
    def values(self) -> np.ndarray:
        """float64 [losses]."""
        return self._series.rows.copy()

    def note(self, step: int, loss: float) -> None:
        """A second one of the same step takes the place of the first; one of an earlier step is dropped."""
        if len(self._series.steps) == 1 and step > self._series.steps[0]:
            self._every = int(step - self._series.steps[0])
        self._series.add(step, np.array(float(loss)), every=self._every, limit=POINTS)

    def to_dict(self) -> dict[str, Any]:
        return {"step": torch.from_numpy(self.steps), "loss": torch.from_numpy(self.values)}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Losses:
        made = cls()
        for step, loss in zip(saved["step"].tolist(), saved["loss"].tolist()):
            made.note(step, loss)
        return made

    @staticmethod
    def nothing() -> dict[str, Any]:
        """What `to_dict` gives of none."""
        return Losses().to_dict()
