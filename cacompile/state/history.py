"""What a run did: noted on the host at the monitor's measurements, bounded, and part of the saved state."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch

from .groups import GroupIndex
from .params import ParamState
from .series import Series, thin
from .spent import Spent, Totals, spent_by

POINTS = 512
"""Most measurements that are kept of a run."""

VALUES = 2**21
"""Most measurements times blocks that are kept of one; of many thousand blocks fewer are kept, but 64."""


def most_points(blocks: int) -> int:
    return min(POINTS, max(64, VALUES // max(1, blocks)))


def note(params: Sequence[ParamState], index: GroupIndex, step: int, descent: np.ndarray, ratio: np.ndarray) -> None:
    """Keep what a measurement has found, before the next step's mask is drawn. Reads nothing from a device.

    descent, ratio: float [groups], as the policy was given them.
    """
    every, limit = params[0].config.monitor_every, most_points(len(index.of_block))
    if all(param.history is not None and not param.history.wants(step, every) for param in params):
        return
    with np.errstate(over="ignore", invalid="ignore"):
        # a group's descent in equal parts on its blocks, so that those that another optimizer steps can be added
        part = (descent / np.bincount(index.of_block, minlength=len(index.all)))[index.of_block]
        skipped = np.concatenate([param.skipped for param in params])
        keep = np.concatenate([_keep(param) for param in params])
        values = np.stack([keep, part, ratio[index.of_block], skipped]).astype(np.float32)
    start = 0
    for param in params:
        if param.history is None:
            param.history = Series((len(values), param.blocks), np.float32)
        param.history.add(step, values[:, start : start + param.blocks], every=every, limit=limit)
        start += param.blocks
    now = time.perf_counter()
    for spent in spent_by(params):
        spent.history.add(step, np.array([now, *spent.counts]), every=every, limit=limit)


def _keep(param: ParamState) -> np.ndarray:
    """The probabilities with which blocks are really kept until the next measurement, float [G]."""
    drawn = np.ones(param.blocks) if param.step < param.config.warmup_steps else param.column("keep")
    held, _, keep = param.pinned
    return np.where(held, keep, drawn)


def forget(params: Sequence[ParamState]) -> None:
    """Drop what was noted, as another run's history is taken over."""
    for param in params:
        param.history = None
    for spent in spent_by(params):
        spent.history = Spent().history


@dataclass(frozen=True, slots=True)
class History:
    """A run, measurement by measurement. P measurements, G groups, F families; numpy on the host."""

    step: np.ndarray
    """int64 [P]: optimizer steps done."""
    seconds: np.ndarray
    """float64 [P]: wall clock since the first compiled graph ran, without the time between a run's interruptions."""
    total: np.ndarray
    """float64 [P]: dW FLOPs that a dense run would have spent so far."""
    saved: np.ndarray
    """float64 [P]: those left out so far."""
    backwards: np.ndarray
    """float64 [P]: backward passes of compiled graphs so far."""
    masked: np.ndarray
    """float64 [P]: those of them that ran the masked version."""
    step_flops: np.ndarray
    """float64 [P]: FLOPs that a dense run's forward and backward passes would have spent so far; NaN where unknown."""
    skipped: np.ndarray
    """int64 [P]: groups of which some gradient was skipped in this very step."""
    keep: np.ndarray
    """float32 [P, G]: probability with which each group is kept from here to the next measurement."""
    descent: np.ndarray
    """float32 [P, G]: expected loss decrease of one step, as last read; NaN where unknown."""
    update_ratio: np.ndarray
    """float32 [P, G]: movement in one step over the group's size, as last read; NaN where unknown."""
    flops: np.ndarray
    """float64 [G]: dW FLOPs of one backward."""
    family: np.ndarray
    """int64 [G]: index among `families`."""
    groups: list[str]
    families: list[str]
    kinds: list[str]
    """Of each family: neurons, heads, filters, experts, tokens, outputs or rows."""
    stride: int
    """Every how many measurements one is kept."""

    def to_dict(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in values.items()}

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> History:
        values = {f.name: saved[f.name] for f in fields(cls)}
        return cls(**{k: v.numpy().copy() if isinstance(v, torch.Tensor) else v for k, v in values.items()})

    @classmethod
    def empty(cls) -> History:
        none, row, table = np.zeros(0, np.int64), np.zeros(0), np.zeros((0, 0), np.float32)
        return cls(none, row, row, row, row, row, row, none, table, table, table, row, none, [], [], [], 1)

    def then(self, later: History, *, every: int, limit: int) -> History:
        """This run and what came after it, thinned as if it were one; groups are those that `later` has.

        As in a `Series`, what is of an earlier step is dropped: new parameters count theirs from 0.
        """
        new = later.step > self.step.max(initial=-1)
        place = {name: i for i, name in enumerate(self.groups)}
        columns = [place.get(name, len(place)) for name in later.groups]
        joined = {name: np.concatenate([getattr(self, name), getattr(later, name)[new]]) for name in BY_STEP}
        for name in BY_GROUP:
            before = np.pad(getattr(self, name), ((0, 0), (0, 1)), constant_values=np.nan)[:, columns]
            joined[name] = np.concatenate([before, getattr(later, name)[new]])
        stride, kept = thin(joined["step"], max(self.stride, later.stride), every=every, limit=limit)
        return replace(later, **{name: values[kept] for name, values in joined.items()}, stride=stride)


BY_STEP = ("step", "seconds", "total", "saved", "backwards", "masked", "step_flops", "skipped")
BY_GROUP = ("keep", "descent", "update_ratio")


def collect(index: GroupIndex, names: tuple[list[str], list[str]], carried: Totals, began: float | None) -> History:
    """The measurements of these parameters since they were first compiled, or since a state was loaded.

    index: of some parameters. names: (families', groups'). carried: what was spent before.
    began: `time.perf_counter()` at second 0; None: when the first graph ran.
    """
    spent = spent_by(index.params)
    series = [s.history for s in spent] + [r.history for r in index.params if r.history is not None]
    steps = np.unique(np.concatenate([np.zeros(0, np.int64), *(each.steps for each in series)]))
    every, limit = index.params[0].config.monitor_every, most_points(len(index.of_block))
    stride, kept = thin(steps, max([1, *(each.stride for each in series)]), every=every, limit=limit)
    steps = steps[kept]
    counts = np.stack([s.history.at(steps) for s in spent]) if spent else np.zeros((0, len(steps), 6))
    began = min((s.started for s in spent), default=0.0) if began is None else began
    clock = np.fmax.reduce(counts[..., 0], axis=0, initial=began) - began
    sums = np.nan_to_num(counts[..., 1:]).sum(0) + np.array(carried[:5])
    blocks = [
        np.full((len(steps), 4, r.blocks), np.nan, np.float32) if r.history is None else r.history.at(steps)
        for r in index.params
    ]
    values = np.concatenate([np.zeros((len(steps), 4, 0), np.float32), *blocks], axis=2)
    order = np.argsort(index.of_block, kind="stable")
    first = np.searchsorted(index.of_block[order], np.arange(len(index.all)))

    def by_group(ufunc: np.ufunc, row: int) -> np.ndarray:
        return ufunc.reduceat(values[:, row, order], first, axis=1) if len(first) else values[:, row]

    flops = np.concatenate([np.zeros(0), *(param.flops for param in index.params)])
    return History(
        step=steps,
        seconds=clock,
        total=sums[:, 0],
        saved=sums[:, 1],
        backwards=sums[:, 2],
        masked=sums[:, 3],
        step_flops=sums[:, 4],
        skipped=(by_group(np.fmax, 3) > 0.0).sum(1),
        keep=by_group(np.fmin, 0),
        descent=by_group(np.add, 1),
        update_ratio=by_group(np.fmax, 2),
        flops=index.sum(flops),
        family=index.family,
        groups=names[1],
        families=names[0],
        kinds=[family.kind for family in index.families],
        stride=stride,
    )
