"""What has been measured of one parameter's blocks: on its way to the host, or kept for the next clip of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class Measurement:
    """One look at the statistics of one parameter's blocks, maybe still on its way to the host."""

    host: Tensor
    """float [2, blocks] on the host, expected descent and update ratio; complete once `event` has passed. Of a shard
    [3, blocks]: its part of the descent, of the squared movement of the samples, and of their squared size."""
    event: torch.cuda.Event | None
    sampled: np.ndarray | None
    """bool [blocks]: those whose gradient was computed; None if the descents are averages that any step may read."""

    def values(self) -> np.ndarray:
        """float64 [2, blocks], of a shard [3, blocks]. Waits only if it is called sooner than the copy takes."""
        if self.event is not None:
            self.event.synchronize()
        return self.host.double().numpy()

    @classmethod
    def whole(cls, parts: Sequence[np.ndarray], sampled: np.ndarray | None) -> Measurement:
        """What ranks have measured on shards of one parameter, put together. parts: float64 [3, blocks] of each."""
        descent, way, size = np.sum(parts, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(way == 0.0, 0.0, np.sqrt(way / size))
        return cls(torch.from_numpy(np.stack([descent, ratio])), None, sampled)

    def to_dict(self) -> dict[str, Tensor | None]:
        sampled = None if self.sampled is None else torch.from_numpy(self.sampled.copy())
        return {"values": torch.from_numpy(self.values()).clone(), "sampled": sampled}

    @classmethod
    def of(cls, saved: dict[str, Any]) -> Measurement:
        return cls(saved["values"], None, None if saved["sampled"] is None else saved["sampled"].numpy())


@dataclass(slots=True)
class NormShares:
    """How much of a gradient's norm each block usually has, in units of |g|^p (inf: |g|) at the first clip."""

    order: float
    values: Tensor
    """float32 [blocks] on the parameter's device; NaN while unknown."""
    known: np.ndarray
    """bool [blocks]: has been computed at a clip. On the host, so that nothing need be asked of the device."""

    def to_dict(self) -> dict[str, Any]:
        known = torch.from_numpy(self.known.copy())
        return {"order": self.order, "values": self.values.to("cpu", copy=True), "known": known}

    @classmethod
    def of(cls, saved: dict[str, Any]) -> NormShares:
        return cls(saved["order"], saved["values"].clone(), saved["known"].numpy().copy())
