"""The controller: monitor -> policy -> turns, for the parameters that one optimizer steps."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Container, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer

from cacompile.kernels.segments import Tables
from cacompile.state.beginning import warn_of_unfound
from cacompile.state.groups import GroupIndex
from cacompile.state.history import note
from cacompile.state.measurements import Measurement
from cacompile.state.params import ParamState
from cacompile.state.table import BlockTable
from cacompile.torch_internals import warning_once

from .estimate import fill, fill_together, to_be_filled
from .lending import lend
from .monitor import Found, learn, measure, measure_together, settings_by_param
from .movement import movements, sample
from .optimizers import adapter_of, statistic_of
from .policy import mean_descent
from .spikes import EARLY, believed_ratio, was_spike
from .turns import next_turns
from .weigh import step_flops, weigh

log = logging.getLogger(__name__)

_numbers = itertools.count(1)


class Controller:
    """Draws the masks of one set of parameters with one Config, all of whose blocks are rows of one table."""

    def __init__(self, params: Sequence[ParamState]) -> None:
        self.params = sorted(params, key=lambda param: param.key or 0)
        self.config = self.params[0].config
        self.table = BlockTable.of(self.params)
        self.rows = _rows(self.params)
        """Its rows in the table, in the order of `params`."""
        self.number = next(_numbers)
        """Its own in the process; parameters tell by it which one has weighed them, against which others."""
        self._blocks = [param.blocks for param in self.params]
        self._segments = Tables()
        self._index = GroupIndex(self.params)
        self._known_pins: tuple[Any, tuple[np.ndarray, ...]] = None, ()
        self._before: dict[int, torch.Tensor] = {}
        """A parameter's id -> what its weights were before this step, if the step is to be measured."""

    def column(self, name: str) -> np.ndarray:
        """One of the table's columns for its blocks, [blocks]; not to be written."""
        return getattr(self.table, name)[self.rows]

    def look(self) -> None:
        """An optimizer step begins: see where the weights are, if it is to be measured."""
        if not capturing():
            self._look_before(self._step + 1)

    def fill(self, optimizer: Optimizer, *, traced: bool = True) -> None:
        """Give every slice that was skipped its estimate, and rescale those that are computed again.

        Called right before the optimizer reads the gradients. traced: Dynamo may see what the step sees; where it does
        not, what was skipped whole need not be written, see `lend`.
        """
        skipped, age, captured = self.column("skipped"), self.column("age"), capturing()
        # what is captured runs again and again with the same groups: none of them has been away
        rescale = not captured and bool(age.any())
        if not (rescale or skipped.any()):
            return
        settings = settings_by_param(optimizer)
        left = to_be_filled(self.params, skipped, age if rescale else np.zeros_like(age))
        if not (traced or captured):
            left = lend(optimizer, settings, left)
        # what is captured must not hold a copy from the host, whose memory is used for other things by then
        near = [] if captured else self._by_device(self.params)[0]
        for param, part in fill_together(near, left, optimizer, settings, self._segments).items():
            fill(optimizer, settings.get(id(param.param), {}), param, part)
        if rescale and adapter_of(optimizer).keeps_mean:
            # an optimizer within another one calls again, with the same gradients
            self.table.age[self.rows] = np.where(skipped, age, 0)

    def advance(self, optimizer: Optimizer | None) -> None:
        """One optimizer step is done: measure when it is time, and draw the next step's mask."""
        if capturing():
            # Nothing of this step has run yet, and when its graph is replayed nobody calls us. What it fills is what
            # was skipped by now, so the mask must stay: it is drawn again after the next step that is not captured.
            warning_once(log, "an optimizer step is captured in a CUDA graph: the mask stays as it was at the capture")
            return
        for param in self.params:
            param.step += 1
        step = self._step
        if step == 1:
            warn_of_unfound(self.config)
        if step % self.config.monitor_every == 0:
            self._monitor(optimizer)
        if optimizer is None:  # then nobody tells when the next step begins
            self._look_before(step + 1)
        # a pin may hold a group off for longer; what it missed then counts no more
        missed = np.minimum(self.column("age") + 1, self.config.max_age)
        self.table.age[self.rows] = np.where(self.column("skipped"), missed, 0)
        self.table.skipped[self.rows] = False
        self.table.set_on(self.rows, self._next_mask(optimizer, step))
        if step % self.config.monitor_every == 0 and log.isEnabledFor(logging.INFO):
            off = ~self._index.every(self.column("on"))
            flops = self.column("flops")
            share = flops[~self.column("on")].sum() / max(1.0, flops.sum())
            log.info(
                "step %d: %d of %d groups are skipped next, %.1f%% of dW FLOPs", step, off.sum(), off.size, 100 * share
            )

    @property
    def _step(self) -> int:
        """Optimizer steps done."""
        return max(param.step for param in self.params)

    @staticmethod
    def _by_device(params: Sequence[ParamState]) -> tuple[list[ParamState], list[ParamState]]:
        """CUDA parameters that lie here whole, and the others."""
        near: list[ParamState] = []
        far: list[ParamState] = []
        for param in params:
            is_near = param.param is not None and param.param.is_cuda and param.shard is None
            (near if is_near else far).append(param)
        return near, far

    def _look_before(self, step: int) -> None:
        self._before = {}
        if step % self.config.monitor_every == 0:
            samples = ((param, sample(param)) for param in self.params)
            self._before = {id(param): found for param, found in samples if found is not None}

    def _update_ratios(self, optimizer: Optimizer | None) -> dict[int, torch.Tensor]:
        """A state's id -> how far its blocks have moved in this step, as `measure` takes it; those that could be seen.

        NaN where a GradScaler has held a fused step back, which only the device knows.
        """
        before, self._before = self._before, {}
        held_back = getattr(optimizer, "found_inf", None)
        seen = []
        for state in self.params:
            param = state.param
            if id(state) not in before or (optimizer is not None and (param is None or param.grad is None)):
                continue
            if (now := sample(state)) is not None and now.device == before[id(state)].device:
                seen.append((state, before[id(state)], now))
        ratios = movements(seen)
        if isinstance(held_back, torch.Tensor):
            held = {device: held_back.to(device) > 0.0 for device in {ratio.device for ratio in ratios.values()}}
            ratios = {name: torch.where(held[ratio.device], torch.nan, ratio) for name, ratio in ratios.items()}
        return ratios

    def _next_mask(self, optimizer: Optimizer | None, step: int) -> np.ndarray:
        """The mask of the next step, bool [blocks]."""
        index = self._index
        if step < self.config.warmup_steps or self._all_on:
            on = np.ones(len(index.of_block), bool)
        else:
            steps = np.array([param.step for param in self.params])
            young = np.repeat(steps < self.config.warmup_steps, self._blocks)
            chosen = self._take_turns(step) | ~index.every((self.column("age") < self.config.max_age) & ~young)
            if (step + 1) % self.config.monitor_every == 0:
                # what has no score has had no gradient, and is not skipped for its own sake
                chosen |= ~index.every(self.averaged(optimizer) | np.isnan(self.column("score")))
            chosen |= ~index.every(~self.column("kept"))
            on = chosen[index.of_block]
        if (pinned := self._pins) is not None:
            held, mask, keep = pinned
            on = np.where(held, mask, on)
            self.table.keep[self.rows] = np.where(held, keep, self.column("keep"))
        return on

    @property
    def _all_on(self) -> bool:
        """Whether every group is computed in every step, and has had its first turn: then nothing need be drawn."""
        return bool((self.column("keep") >= 1.0).all() and (self.column("phase") >= 0.0).all())

    @property
    def _pins(self) -> tuple[np.ndarray, ...] | None:
        """What pins hold, their masks and the probabilities of these, each [blocks]; None where nothing is pinned."""
        if not any(param.pin is not None for param in self.params):
            return None
        key = self.table.structure, [param.pin for param in self.params]
        if self._known_pins[0] != key:
            self._known_pins = key, tuple(map(np.concatenate, zip(*(param.pinned for param in self.params))))
        return self._known_pins[1]

    def averaged(self, optimizer: Optimizer | None) -> np.ndarray:
        """bool [blocks]: those that can be judged though they are skipped, as the optimizer keeps a mean for them."""
        settings, found = settings_by_param(optimizer), []
        for state in self.params:
            param = state.param
            try:
                kept = (
                    None if param is None else statistic_of(optimizer, settings.get(id(param), {}), param, state.step)
                )
            except Exception:
                kept = None  # the measurement says so
            found.append(np.full(state.blocks, kept is not None and kept.averaged))
        return np.concatenate(found)

    def _take_turns(self, step: int) -> np.ndarray:
        """bool [groups]: those whose turn it is."""
        index = self._index
        # with a parameter's key, so that the controllers of one model do not draw alike
        counters = self.config.seed, step, self.params[0].key or 0
        keep = self.column("keep")
        if (pinned := self._pins) is not None:  # what a pin leaves of a group goes on as it was
            keep = np.where(pinned[0], 1.0, keep)
        keep = index.least(keep)
        phase = index.least(self.column("phase"))
        on, phase = next_turns(keep, phase, index.turn, index.role, counters)
        self.table.phase[self.rows] = phase[index.of_block]
        return on

    def _monitor(self, optimizer: Optimizer | None) -> None:
        last = self.column("score").copy(), self.column("update_ratio").copy()
        self.measure(optimizer)
        self._decide(optimizer, *last)

    def measure(self, optimizer: Optimizer | None, own: Container[int] | None = None) -> None:
        """Learn what `read` finds, where this rank can see all of it."""
        settings = settings_by_param(optimizer)
        for param, known in self.read(optimizer, own):
            if param.shard is not None:
                known = Measurement.whole([known.values()], known.sampled)
            learn(param, known, rate_of(settings.get(id(param.param), {})))

    def read(self, optimizer: Optimizer | None, own: Container[int] | None = None) -> Found:
        """Measure; gives the last measurement, or this one if it needs no waiting: always the same, so that runs agree.

        own: ids of the parameters to look at, where it is not all of them.
        """
        near, far = self._by_device(self.params)
        if own is not None:
            near, far = ([state for state in each if id(state.param) in own] for each in (near, far))
        ratios = self._update_ratios(optimizer)
        found, left = measure_together(near, optimizer, self._segments, ratios)
        ready = []
        for param, taken in found + measure(far + left, optimizer, ratios):
            known, param.in_flight = (taken, None) if taken.event is None else (param.in_flight, taken)
            if known is not None:
                ready.append((param, known))
        return ready

    def _count(self) -> None:
        """Bring the FLOPs of each block up to date."""
        for param in self.params:
            param.count()

    def _decide(self, optimizer: Optimizer | None, last_score: np.ndarray, last_ratio: np.ndarray) -> None:
        """How often each group is computed from here on, by what has been measured now and, for comparison, before."""
        self._count()
        index, flops, settings = self._index, self.column("flops"), settings_by_param(optimizer)
        rate = np.repeat([rate_of(settings.get(id(param.param), {})) for param in self.params], self._blocks)
        descent, last = self.column("score") * rate, last_score * rate
        self.table.descent[self.rows] = descent
        fixed = np.concatenate([param.frozen_blocks for param in self.params])
        fixed |= ~index.every(~self.column("kept"))[index.of_block]
        descent, last = (np.where(fixed, 0.0, each) for each in (descent, last))
        measurements = np.repeat([param.step for param in self.params], self._blocks) / self.config.monitor_every
        usual = self.column("mean_descent")
        spike = was_spike(usual, descent, last, early=self._step <= EARLY * self.config.monitor_every)
        movement = believed_ratio(self.column("update_ratio"), last_ratio, spike=spike)
        self.table.mean_descent[self.rows] = means = mean_descent(usual, descent, measurements, last)
        weighed = weigh(index, descent, movement, flops, means, fixed, step_flops(self.params))
        keep = weighed.keep(self.config)
        self.table.keep[self.rows] = keep[index.of_block]
        for param in self.params:
            param.decided = (self.number, self._step)
        note(self.params, index, self._step, weighed.descent, weighed.ratio)


def _rows(params: Sequence[ParamState]) -> slice | np.ndarray:
    """The rows of some parameters of one table, in their order: a slice where they lie together."""
    rows = np.concatenate([np.arange(param.rows.start, param.rows.stop) for param in params])
    return slice(rows[0], rows[-1] + 1) if (np.diff(rows) == 1).all() else rows


def capturing() -> bool:
    """Whether the user is recording this step into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def rate_of(settings: Mapping[str, Any]) -> float:
    """A group's learning rate as a number; one that lives on a device is not waited for, and some have none."""
    lr = settings.get("lr", 1.0)
    if isinstance(lr, torch.Tensor):
        return float(lr) if lr.device.type == "cpu" else 1.0
    return float(lr) if isinstance(lr, (int, float)) else 1.0
