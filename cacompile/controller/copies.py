"""Copies: whether ranks that hold the same parameters still have the same weights, by a few of one at each reading."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from cacompile.state.params import ParamState
from cacompile.state.replicas import Replicas

from .monitor import fetch

log = logging.getLogger(__name__)

SAMPLES = 64
"""Weights of the parameter whose turn it is: a step that one rank leaves out moves nearly all of them."""

KEPT = 4
"""Readings that are remembered: what others tell is older."""

Weights = tuple[int, bytes]
"""The place of a parameter, and some of its weights, float32."""


class _Look(NamedTuple):
    clock: int
    place: int
    host: torch.Tensor
    """Complete once `event` has passed."""
    event: torch.cuda.Event | None

    def weights(self) -> Weights:
        if self.event is not None:  # of a reading ago, so it has
            self.event.synchronize()
        return self.place, self.host.numpy().tobytes()


class Copies:
    """What one rank knows of some of its weights; told at the reading after, so that no device is waited for."""

    def __init__(self, replicas: Replicas) -> None:
        self._looks: list[_Look] = []
        self._replicas = replicas

    def look(self, members: Sequence[ParamState], clock: int, every: int) -> None:
        """See where some weights are after the optimizer's step `clock`, at a reading. every: steps between two."""
        state = members[clock // every % len(members)]
        param = state.param
        # shards and shares lie on one rank alone
        if param is None or type(param) is not torch.nn.Parameter or state.shard is not None or self._replicas.apart:
            return
        if param.numel() and param.is_contiguous():
            flat = param.detach().view(-1)
            host, event = fetch(flat[:: -(-len(flat) // SAMPLES)].to(torch.float32, copy=True))
            self._looks = [*self._looks, _Look(clock, state.place, host, event)][-KEPT:]

    def told(self, clock: int) -> tuple[int, Weights] | None:
        """When, and what was seen, at the last reading before the one after step `clock`."""
        last = next((look for look in reversed(self._looks) if look.clock < clock), None)
        return None if last is None else (last.clock, last.weights())

    def compare(self, members: Sequence[ParamState], theirs: tuple[int, Weights] | None, rank: int) -> None:
        """Warn where another rank has seen other weights at the same reading. theirs: as it has told."""
        if theirs is None or self._replicas.apart:
            return
        clock, (place, its) = theirs
        ours = next((look for look in self._looks if (look.clock, look.place) == (clock, place)), None)
        if ours is None:
            return
        _, mine = ours.weights()
        if np.array_equal(np.frombuffer(mine, np.float32), np.frombuffer(its, np.float32), equal_nan=True):
            return
        self._replicas.apart = True
        log.warning(
            "%s does not have the same weights on ranks 0 and %d after step %d of the optimizer: each trains a model "
            "of its own now. Have all ranks begin with the same weights, and their optimizers take the same steps",
            next(param.name for param in members if param.place == place),
            rank,
            clock,
        )

    def forget(self) -> None:
        """Steps are counted anew, or weights have been given to some ranks by others."""
        self._looks = []
