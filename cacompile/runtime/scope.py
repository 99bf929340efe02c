"""The groups that are drawn together: those of the parameters that one optimizer steps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch._logging import warning_once
from torch.optim import Optimizer

from cacompile.kernels.segments import Tables

from .drift import moved, sample
from .estimate import fill, fill_together, keeps_mean
from .history import note
from .mask import first_turns, generator, take_turns
from .monitor import learn, read_scores, read_together, settings_by_param
from .policy import keep_probabilities, usual_descent
from .sources import source_of
from .tracked import GroupState, Tracked, registry
from .units import Units

log = logging.getLogger(__name__)


class Scope:
    """Monitor -> policy -> mask for one set of parameters with one Config."""

    def __init__(self, tracked: Sequence[Tracked]) -> None:
        self.tracked = sorted(tracked, key=lambda record: record.key or 0)
        self.config = self.tracked[0].config
        self.state = GroupState.joined([record.state for record in self.tracked])
        self._flops = np.concatenate([record.flops for record in self.tracked])
        self._tables = Tables()
        self._units = Units(self.tracked)
        self._before: dict[int, torch.Tensor] = {}
        """A record's id -> what its weights were before this step, if the step is to be read."""

    @property
    def valid(self) -> bool:
        """False once another scope has joined one of these states."""
        return all(record.state.on.base is self.state.on for record in self.tracked)

    def _by_device(self) -> tuple[list[Tracked], list[Tracked]]:
        """The records of CUDA parameters, and the others."""
        near: list[Tracked] = []
        far: list[Tracked] = []
        for record in self.tracked:
            param = record.ref()
            (near if param is not None and param.is_cuda else far).append(record)
        return near, far

    @property
    def _captured(self) -> bool:
        """Whether the user is recording this step into a CUDA graph."""
        return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()

    def fill(self, optimizer: Optimizer) -> None:
        """Give every slice that was skipped its estimate, and weight up those that are computed again.

        Called right before the optimizer reads the gradients.
        """
        skipped, captured = np.concatenate([record.skipped for record in self.tracked]), self._captured
        # what is captured runs again and again with the same groups: none of them has been away
        weight_up = not captured and bool(self.state.age.any())
        if not (weight_up or skipped.any()):
            return
        settings = settings_by_param(optimizer)
        # what is captured must not hold a copy from the host, whose memory is used for other things by then
        near, far = ([], self.tracked) if captured else self._by_device()
        for record in far + fill_together(near, optimizer, settings, self._tables):
            fill(optimizer, settings.get(id(record.ref()), {}), record, weight_up=weight_up)
        if weight_up and keeps_mean(optimizer):
            # an optimizer within another one calls again, with the same gradients
            self.state.age[~skipped] = 0

    @property
    def _step(self) -> int:
        """Optimizer steps done."""
        return max(record.step for record in self.tracked)

    def look(self) -> None:
        """An optimizer step begins: see where the weights are, if it is to be read."""
        if not self._captured:
            self._look_before(self._step + 1)

    def _look_before(self, step: int) -> None:
        self._before = {}
        if step % self.config.monitor_every == 0:
            samples = ((record, sample(record)) for record in self.tracked)
            self._before = {id(record): found for record, found in samples if found is not None}

    def _speeds(self, optimizer: Optimizer | None) -> dict[int, torch.Tensor]:
        """A record's id -> how far its blocks have moved in this step, float32 [G]; those that could be seen.

        NaN where a GradScaler has held a fused step back, which only the device knows.
        """
        before, self._before = self._before, {}
        held_back = getattr(optimizer, "found_inf", None)
        speeds = {}
        for record in self.tracked:
            param = record.ref()
            if id(record) not in before or (optimizer is not None and (param is None or param.grad is None)):
                continue
            if (now := sample(record)) is None or now.device != before[id(record)].device:
                continue
            speed = moved(before[id(record)], now)
            if isinstance(held_back, torch.Tensor):
                speed = torch.where(held_back.to(speed.device) > 0.0, torch.nan, speed)
            speeds[id(record)] = speed
        return speeds

    def advance(self, optimizer: Optimizer | None) -> None:
        """One optimizer step is done: read scores when it is time, and draw the next step's mask."""
        if self._captured:
            # Nothing of this step has run yet, and when its graph is replayed nobody calls us. What it fills is what
            # was skipped by now, so the mask must stay: it is drawn again after the next step that is not captured.
            warning_once(log, "an optimizer step is captured in a CUDA graph: the mask stays as it was at the capture")
            return
        for record in self.tracked:
            record.step += 1
        steps, step = np.array([record.step for record in self.tracked]), self._step
        if step % self.config.monitor_every == 0:
            self._monitor(optimizer)
        if optimizer is None:  # then nobody tells when the next step begins
            self._look_before(step + 1)
        state = self.state
        for record in self.tracked:
            # a pin may hold a group off for longer; what it missed then counts no more
            missed = np.minimum(record.state.age + 1, self.config.max_age)
            record.state.age[:] = np.where(record.skipped, missed, 0)
            record.skipped[:] = False
        was_dense = state.on.all()
        if step < self.config.warmup_steps:
            state.on[:] = True
        else:
            young = np.repeat(steps < self.config.warmup_steps, [record.groups for record in self.tracked])
            on = self._take_turns(step) | ~self._units.every((state.age < self.config.max_age) & ~young)
            if (step + 1) % self.config.monitor_every == 0:
                # what has no score has had no gradient, and is not skipped for its own sake
                on |= ~self._units.every(self._averaged(optimizer) | np.isnan(state.score))
            state.on[:] = on[self._units.of_block]
        for record in self.tracked:
            if record.pin is not None:
                record.state.on[:] = record.pinned_mask()
                record.state.keep[:] = record.pin.keep_of(record)
        if not (was_dense and state.on.all()):
            registry.epoch += 1
        if step % self.config.monitor_every == 0 and log.isEnabledFor(logging.INFO):
            off = ~self._units.every(state.on)
            share = self._flops[~state.on].sum() / max(1.0, self._flops.sum())
            log.info(
                "step %d: %d of %d groups are skipped next, %.1f%% of dW FLOPs", step, off.sum(), off.size, 100 * share
            )

    def _averaged(self, optimizer: Optimizer | None) -> np.ndarray:
        """bool [blocks]: those that can be judged though they are skipped, as the optimizer keeps a mean for them."""
        settings, found = settings_by_param(optimizer), []
        for record in self.tracked:
            param = record.ref()
            try:
                source = (
                    None if param is None else source_of(optimizer, settings.get(id(param), {}), param, record.step)
                )
            except Exception:
                source = None  # the reading says so
            found.append(np.full(record.groups, source is not None and source.averaged))
        return np.concatenate(found)

    def _take_turns(self, step: int) -> np.ndarray:
        """bool [units]: those whose turn it is."""
        state, units = self.state, self._units
        due = units.least(state.due)
        if (new := due < 0.0).any():
            # with a parameter's key, so that the scopes of one model do not draw alike
            random = generator(self.config.seed, step, self.tracked[0].key or 0)
            due = np.where(new, first_turns(units.family, random), due)
        on, due = take_turns(units.least(state.keep), due)
        state.due[:] = due[units.of_block]
        return on

    def _monitor(self, optimizer: Optimizer | None) -> None:
        """Use each last reading, or this one if it needs no waiting: always the same one, so that ranks agree."""
        near, far = self._by_device()
        speeds = self._speeds(optimizer)
        found, left = read_together(near, optimizer, self._tables, speeds)
        for record, scores in found + read_scores(far + left, optimizer, speeds):
            due, record.awaited = (scores, None) if scores.event is None else (record.awaited, scores)
            if due is not None:
                learn(record, due)
        self._decide(optimizer)

    def _decide(self, optimizer: Optimizer | None) -> None:
        """How often each group is computed from here on, by what has been read."""
        state, units, flops = self.state, self._units, self._flops
        groups, settings = [record.groups for record in self.tracked], settings_by_param(optimizer)
        rate = [_rate(settings.get(id(record.ref()), {}).get("lr", 1.0)) for record in self.tracked]
        descent = state.score * np.repeat(rate, groups)
        readings = np.array([record.step for record in self.tracked]) / self.config.monitor_every
        state.usual[:] = usual_descent(state.usual, descent, np.repeat(readings, groups))
        # what costs nothing need not be known, nor what has had no gradient yet while the rest of its group has
        known = np.isfinite(descent)
        some = units.sum(known & (flops > 0.0))[units.of_block] > 0.0
        descent = np.where(~known & ((flops == 0.0) | some), 0.0, descent)
        counted = np.where(known, flops, 0.0)
        with np.errstate(invalid="ignore"):
            speed = units.sum(np.where(counted > 0.0, state.speed * counted, 0.0)) / units.sum(counted)
        descent, usual = units.sum(descent), units.sum(np.nan_to_num(state.usual))
        keep = keep_probabilities(descent, speed, units.sum(flops), usual, self.config)
        state.keep[:] = keep[units.of_block]
        note(self.tracked, units, self._step, descent, speed)


def _rate(lr: Any) -> float:
    """Learning rate as a number; one that lives on a device is not waited for, and some optimizers have none."""
    if isinstance(lr, torch.Tensor):
        return float(lr) if lr.device.type == "cpu" else 1.0
    return float(lr) if isinstance(lr, (int, float)) else 1.0
