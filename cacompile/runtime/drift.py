"""How far each group moves in a step, as a share of its size: from a few of its weights, before and after the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .tracked import Partition, Tracked

SAMPLES = 64
"""Weights of a block that are looked at: a group's movement is known to about an eighth then."""


def coordinates(partition: Partition, shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Where the samples of each block are, int64 [G * SAMPLES] a dimension; blocks that are smaller repeat some."""
    dim = partition.dim
    starts = np.arange(partition.groups) * partition.block
    rows = np.minimum(partition.block, partition.rows - starts)
    others = [size for d, size in enumerate(shape) if d != dim]
    row = starts[:, None] + (np.arange(SAMPLES) * rows[:, None]) // SAMPLES
    # multiples of the golden ratio: evenly spread, and no column goes with a row
    column = (np.arange(SAMPLES) * 0.6180339887498949 % 1.0 * int(np.prod(others, dtype=np.int64))).astype(np.int64)
    places = list(np.unravel_index(np.tile(column, partition.groups), others)) if others else []
    places.insert(dim, row.reshape(-1))
    return tuple(np.asarray(each, np.int64) for each in places)


@torch.no_grad()
def sample(record: Tracked) -> torch.Tensor | None:
    """Some weights of each block, float32 [G, SAMPLES] on the parameter's device; None where they cannot be read."""
    param = record.ref()
    if param is None or record.partition is None or type(param) is not torch.nn.Parameter or param.is_complex():
        return None
    if param.numel() == 0 or tuple(param.shape) != record.shape:
        return None
    if record.places is None or record.places[0].device != param.device:
        made = coordinates(record.partition, record.shape)
        record.places = tuple(torch.from_numpy(each).to(param.device) for each in made)
    return param.detach()[record.places].float().view(-1, SAMPLES)


@torch.no_grad()
def moved(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Share of its own size that each block has moved: float32 [G], from samples [G, SAMPLES].

    A block of zeros that starts to move is infinitely fast; of one with a NaN nothing is known.
    """
    way = (now - before).norm(dim=1)
    return torch.where(way == 0.0, 0.0, way / before.norm(dim=1))
