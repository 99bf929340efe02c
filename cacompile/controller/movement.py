"""Update ratio: movement of a block in a step over its size, from a few of its weights before and after the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cacompile.layout import Partition
from cacompile.state.params import ParamState
from cacompile.state.shards import local

SAMPLES = 64
"""Weights of a block that are looked at: a group's movement is known to about an eighth then."""


def coordinates(partition: Partition, shape: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Where the samples of each block are, int64 [blocks * SAMPLES] a dimension; smaller blocks repeat some."""
    dim = partition.dim
    starts = np.arange(partition.blocks) * partition.block
    rows = np.minimum(partition.block, partition.rows - starts)
    others = [size for d, size in enumerate(shape) if d != dim]
    row = starts[:, None] + (np.arange(SAMPLES) * rows[:, None]) // SAMPLES
    # multiples of the golden ratio: evenly spread, and no column goes with a row
    column = (np.arange(SAMPLES) * 0.6180339887498949 % 1.0 * int(np.prod(others, dtype=np.int64))).astype(np.int64)
    places = list(np.unravel_index(np.tile(column, partition.blocks), others)) if others else []
    places.insert(dim, row.reshape(-1))
    return tuple(np.asarray(each, np.int64) for each in places)


@torch.no_grad()
def sample(state: ParamState) -> torch.Tensor | None:
    """Some weights of each block, float32 [blocks, SAMPLES] on the parameter's device; None where none can be read.

    What lies on other ranks is zero.
    """
    param = state.param
    if param is None or state.partition is None or not (state.shard or type(param) is torch.nn.Parameter):
        return None
    if param.numel() == 0 or tuple(param.shape) != state.shape:
        return None
    mine = local(param.detach())
    if state.sampled is None or state.sampled[0].device != mine.device:
        made = coordinates(state.partition, state.shape)
        here = np.arange(len(made[0]))
        if (shard := state.shard) is not None:
            here = np.flatnonzero((made[shard.dim] >= shard.start) & (made[shard.dim] < shard.stop))
            made = tuple(each[here] - (shard.start if d == shard.dim else 0) for d, each in enumerate(made))
        state.sampled = tuple(torch.from_numpy(each).to(mine.device) for each in (*made, here))
    *where, here = state.sampled
    found = mine[tuple(where)].float()
    if state.shard is not None:
        found = found.new_zeros(state.blocks * SAMPLES).index_copy_(0, here, found)
    return found.view(-1, SAMPLES)


@torch.no_grad()
def movements(seen: Sequence[tuple[ParamState, torch.Tensor, torch.Tensor]]) -> dict[int, torch.Tensor]:
    """A state's id -> `moved` of its samples before and after a step, of a shard `moved_here`; each once for all."""
    alike: dict[tuple[torch.device, bool], list[tuple[ParamState, torch.Tensor, torch.Tensor]]] = {}
    for each in seen:
        alike.setdefault((each[1].device, each[0].shard is None), []).append(each)
    found: dict[int, torch.Tensor] = {}
    for (_, whole), parts in alike.items():
        states, before, now = zip(*parts)
        together = (moved if whole else moved_here)(torch.cat(before), torch.cat(now))
        found |= zip(map(id, states), together.split([state.blocks for state in states], dim=-1))
    return found


@torch.no_grad()
def moved(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """Share of its own size that each block has moved: float32 [blocks], from samples [blocks, SAMPLES].

    A block of zeros that starts to move is infinitely fast; of one with a NaN or inf nothing is known.
    """
    way = (now - before).norm(dim=1)
    way = torch.where(way.isfinite(), way, torch.nan)
    return torch.where(way == 0.0, 0.0, way / before.norm(dim=1))


@torch.no_grad()
def moved_here(before: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
    """What a shard adds to the squares of movement and size of each block: float32 [2, blocks]."""
    way = (now - before).square().sum(1)
    return torch.stack([torch.where(way.isfinite(), way, torch.nan), before.square().sum(1)])
