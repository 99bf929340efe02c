"""The decider: the controller of the rank that decides for all, and what others tell it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch.optim import Optimizer

from cacompile.state.measurements import Measurement
from cacompile.state.params import ParamState

from .agreed import FREE, SHOWN, Agreed
from .controller import Controller, rate_of
from .monitor import learn, settings_by_param

Parts = dict[int, tuple[np.ndarray | None, np.ndarray | None]]
"""Place -> what a rank's shard adds to its measurement, None where another speaks for the same rows, and `sampled`."""


def flops_told(members: Sequence[ParamState]) -> dict[int, float]:
    """Place -> dW FLOPs of a step on this rank, on average."""
    return {
        param.place: float(param.counted.sum()) / max(1, param.step - param.counted_from)
        for param in members
        if param.blocks
    }


def scores_told(params: Sequence[ParamState], averaged: np.ndarray) -> dict[int, tuple[np.ndarray, ...]]:
    """Place -> (score, update ratio, whether any step may read it), of parameters that this rank alone steps.

    averaged: bool [blocks of all].
    """
    each = np.split(averaged, np.cumsum([param.blocks for param in params])[:-1])
    return {
        param.place: (param.column("score").copy(), param.column("update_ratio").copy(), of)
        for param, of in zip(params, each)
    }


class Decider(Controller):
    """Measures and decides; the mask that it decides on is drawn by all ranks alike, this one among them."""

    def __init__(self, params: Sequence[ParamState]) -> None:
        super().__init__(params)
        self.structure = self.table.structure
        self.fresh: Parts = {}
        """What this rank's shards had at this reading."""
        self._flops: list[dict[int, float]] = []

    def parts(self, optimizer: Optimizer | None) -> Parts:
        """What this rank's shards have at this reading."""
        found = ((param.place, param.shard, known) for param, known in self.read(optimizer))
        return {
            place: (known.values() if shard.counts else None, known.sampled)
            for place, shard, known in found
            if shard is not None
        }

    def decide(
        self,
        optimizer: Optimizer | None,
        owner: Optimizer | None,
        own: set[int] | None,
        told: Sequence[Mapping[str, Any]],
        shards: Sequence[Parts],
    ) -> Agreed:
        """optimizer: whose learning rates count; owner: what keeps the state of the parameters whose ids are in `own`,
        of all where that is None; the others are known from what their ranks have told. shards: of each rank."""
        before = self.column("keep").copy()
        last = self.column("score").copy(), self.column("update_ratio").copy()
        if self.params[0].shard is None:
            self.measure(owner, own)
        else:
            self.fresh = self.parts(owner)
            self._learn(optimizer, shards)
        averaged = self.averaged(owner)
        scores: Mapping[int, tuple[np.ndarray, ...]] = {
            place: values for known in told for place, values in known["scores"].items()
        }
        start = 0
        for param in self.params:
            if own is not None and id(param.param) not in own and param.place in scores:
                param.column("score")[:], param.column("update_ratio")[:], of = scores[param.place]
                averaged[start : start + param.blocks] = of
            start += param.blocks
        self._flops = [flops_told(self.params), *(known["flops"] for known in told)]
        self._decide(optimizer, *last)
        keep = self.column("keep").copy()
        self.table.keep[self.rows] = before  # all ranks take it over together, in the next step
        return self._agreed(keep, averaged & ~np.isnan(self.column("score")))

    def _learn(self, optimizer: Optimizer | None, shards: Sequence[Parts]) -> None:
        """Put together what all ranks have measured on their shards, of the parameters that all tell of."""
        settings = settings_by_param(optimizer)
        for param in self.params:
            if all(param.place in each for each in shards):
                parts = [values for values, _ in (each[param.place] for each in shards) if values is not None]
                known = Measurement.whole(parts, shards[0][param.place][1])
                learn(param, known, rate_of(settings.get(id(param.param), {})))

    def _count(self) -> None:
        """The mean of all ranks: each has other batches."""
        super()._count()
        for param in self.params:
            found = [flops.get(param.place, 0.0) for flops in self._flops]
            mine = found[0] or float(param.flops.sum())
            if any(found) and mine:
                param.flops[:] *= sum(found) / len(found) / mine

    def _agreed(self, keep: np.ndarray, readable: np.ndarray) -> Agreed:
        pinned = np.full(len(keep), FREE, np.int8)
        if (pins := self._pins) is not None:
            held, mask, drawn_with = pins
            pinned, keep = np.where(held, mask, pinned).astype(np.int8), np.where(held, drawn_with, keep)
        config, blocks = self.config, len(keep)
        return Agreed(
            places=[param.place for param in self.params],
            blocks=self._blocks,
            of_block=self._index.of_block,
            turn=self._index.turn,
            role=self._index.role,
            seed=config.seed,
            key=self.params[0].key or 0,
            warmup_steps=config.warmup_steps,
            max_age=config.max_age,
            every=config.monitor_every,
            keep=keep,
            phase=self.column("phase").copy(),  # also of a state that was loaded; what is agreed already goes on
            age=self.column("age").copy(),
            on=np.ones(blocks, bool),
            pinned=pinned,
            readable=readable,
            shown={name: self.column(name).copy() for name in SHOWN},
        )
