"""The groups that are drawn together: those of the parameters that one optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.optim import Optimizer

from .estimate import fill_skipped
from .mask import draw, generator
from .monitor import learn, read_scores, settings_by_param
from .policy import keep_probabilities
from .tracked import GroupState, Tracked, registry


class Scope:
    """Monitor -> policy -> mask for one set of parameters with one Config."""

    def __init__(self, tracked: Sequence[Tracked]) -> None:
        self.tracked = sorted(tracked, key=lambda record: record.key or 0)
        self.config = self.tracked[0].config
        self.state = GroupState.joined([record.state for record in self.tracked])
        self._flops = np.concatenate([record.flops for record in self.tracked])
        self._family = np.repeat(np.arange(len(self.tracked)), [record.groups for record in self.tracked])

    @property
    def valid(self) -> bool:
        """False once another scope has joined one of these states."""
        return all(record.state.on.base is self.state.on for record in self.tracked)

    def fill(self, optimizer: Optimizer) -> None:
        """Give every slice that was skipped its estimate; called right before the optimizer reads the gradients."""
        settings = None
        for record in self.tracked:
            if record.skipped.any():
                settings = settings or settings_by_param(optimizer)
                fill_skipped(optimizer, settings.get(id(record.ref()), {}), record)

    def advance(self, optimizer: Optimizer | None) -> None:
        """One optimizer step is done: read scores when it is time, and draw the next step's mask."""
        for record in self.tracked:
            record.step += 1
        steps = np.array([record.step for record in self.tracked])
        step = int(steps.max())
        if step % self.config.monitor_every == 0:
            self._monitor(optimizer)
        for record in self.tracked:
            record.skipped[:] = False
        state = self.state
        was_dense = state.on.all()
        if step < self.config.warmup_steps:
            state.on[:] = True
        else:
            # with a parameter's key, so that the scopes of one model do not draw alike
            random = generator(self.config.seed, step, self.tracked[0].key or 0)
            state.on[:] = draw(state.keep, self._family, random)
            state.on |= (state.age >= self.config.max_age) | (steps < self.config.warmup_steps)[self._family]
        for record in self.tracked:
            if record.pin is not None:
                record.state.on[:] = record.pin.mask_of(record)
                record.state.keep[:] = record.pin.keep_of(record)
        state.age[:] = np.where(state.on, 0, state.age + 1)
        if not (was_dense and state.on.all()):
            registry.epoch += 1

    def _monitor(self, optimizer: Optimizer | None) -> None:
        """Use each last reading, or this one if it needs no waiting: always the same one, so that ranks agree."""
        for record, scores in read_scores(self.tracked, optimizer):
            due, record.awaited = (scores, None) if scores.event is None else (record.awaited, scores)
            if due is not None:
                learn(record, due)
        rates = settings_by_param(optimizer)
        rate = [_rate(rates.get(id(record.ref()), {}).get("lr", 1.0)) for record in self.tracked]
        descent = self.state.score * np.array(rate)[self._family]
        settled = 1.0 - self.state.score / np.where(self.state.peak > 0.0, self.state.peak, 1.0)
        self.state.keep[:] = keep_probabilities(descent, settled, self._flops, self.config)


def _rate(lr: float | torch.Tensor) -> float:
    """Learning rate as a number; one that lives on a device is not waited for."""
    if isinstance(lr, torch.Tensor):
        return float(lr) if lr.device.type == "cpu" else 1.0
    return float(lr)
