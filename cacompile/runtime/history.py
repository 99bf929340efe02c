"""What a run did: noted on the host at the monitor's readings, bounded, and part of the saved state."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from .series import Series, thin
from .tracked import Spent, Tracked
from .units import Units

POINTS = 512
"""Most readings that are kept of a run."""

VALUES = 2**21
"""Most readings times blocks that are kept of one; models of many thousand blocks keep fewer readings, but 64."""


def most_points(blocks: int) -> int:
    return min(POINTS, max(64, VALUES // max(1, blocks)))


def note(tracked: Sequence[Tracked], units: Units, step: int, descent: np.ndarray, speed: np.ndarray) -> None:
    """Keep what a reading has found, before the next step's mask is drawn. Reads nothing from a device.

    descent, speed: float [units], as the policy was given them.
    """
    every, limit = tracked[0].config.monitor_every, most_points(len(units.of_block))
    if all(record.history is not None and not record.history.wants(step, every) for record in tracked):
        return
    with np.errstate(over="ignore", invalid="ignore"):
        # a group's descent in equal parts on its blocks, so that those that another optimizer steps can be added
        part = (descent / np.bincount(units.of_block, minlength=len(units.all)))[units.of_block]
        skipped = np.concatenate([record.skipped for record in tracked])
        keep = np.concatenate([_keep(record) for record in tracked])
        values = np.stack([keep, part, speed[units.of_block], skipped]).astype(np.float32)
    start = 0
    for record in tracked:
        if record.history is None:
            record.history = Series((len(values), record.groups), np.float32)
        record.history.add(step, values[:, start : start + record.groups], every=every, limit=limit)
        start += record.groups
    now = time.perf_counter()
    for spent in _spent(tracked):
        spent.history.add(step, np.array([now, *spent.counts]), every=every, limit=limit)


def _keep(record: Tracked) -> np.ndarray:
    """The probabilities with which blocks are really kept until the next reading, float [G]."""
    if record.pin is not None:
        return record.pin.keep_of(record)
    return np.ones(record.groups) if record.step < record.config.warmup_steps else record.state.keep


def forget(tracked: Sequence[Tracked]) -> None:
    """Drop what was noted, as another run's history is taken over."""
    for record in tracked:
        record.history = None
    for spent in _spent(tracked):
        spent.history = Spent().history


def _spent(tracked: Sequence[Tracked]) -> list[Spent]:
    return list({id(spent): spent for record in tracked for spent in record.spent}.values())


class Totals(NamedTuple):
    """What has been spent before a moment."""

    total: float = 0.0
    """dW FLOPs that a dense run would have spent."""
    saved: float = 0.0
    backwards: int = 0
    """Backward passes of compiled graphs."""
    guarded: int = 0
    """Those that ran the guarded version; the others ran Inductor's own."""

    @classmethod
    def of(cls, tracked: Sequence[Tracked]) -> Totals:
        counts = [spent.counts for spent in _spent(tracked)]
        return cls(
            total=sum(total for total, *_ in counts),
            saved=sum(saved for _, saved, *_ in counts),
            backwards=sum(backwards for _, _, backwards, _ in counts),
            guarded=sum(guarded for *_, guarded in counts),
        )


def add(a: Totals, b: Totals, sign: int = 1) -> Totals:
    return Totals(
        a.total + sign * b.total,
        a.saved + sign * b.saved,
        a.backwards + sign * b.backwards,
        a.guarded + sign * b.guarded,
    )


@dataclass(frozen=True, slots=True)
class History:
    """A run, reading by reading. P readings, G groups, F families; numpy on the host."""

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
    guarded: np.ndarray
    """float64 [P]: those of them that ran the guarded version."""
    skipped: np.ndarray
    """int64 [P]: groups of which some gradient was skipped in this very step."""
    keep: np.ndarray
    """float32 [P, G]: probability with which each group is kept from here to the next reading."""
    descent: np.ndarray
    """float32 [P, G]: expected loss decrease of one step, as last read; NaN where unknown."""
    speed: np.ndarray
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
    """Every how many readings one is kept."""

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
        return cls(none, row, row, row, row, row, none, table, table, table, row, none, [], [], [], 1)

    def then(self, later: History, *, every: int, limit: int) -> History:
        """This run and what came after it, thinned as if it were one; groups are those that `later` has."""
        place = {name: i for i, name in enumerate(self.groups)}
        columns = [place.get(name, len(place)) for name in later.groups]
        joined = {name: np.concatenate([getattr(self, name), getattr(later, name)]) for name in BY_STEP}
        for name in BY_GROUP:
            before = np.pad(getattr(self, name), ((0, 0), (0, 1)), constant_values=np.nan)[:, columns]
            joined[name] = np.concatenate([before, getattr(later, name)])
        stride, kept = thin(joined["step"], max(self.stride, later.stride), every=every, limit=limit)
        return replace(later, **{name: values[kept] for name, values in joined.items()}, stride=stride)


BY_STEP = ("step", "seconds", "total", "saved", "backwards", "guarded", "skipped")
BY_GROUP = ("keep", "descent", "speed")


def collect(units: Units, names: tuple[list[str], list[str]], carried: Totals, began: float | None) -> History:
    """The readings of these parameters since they were first compiled, or since a state was loaded.

    units: some, with records. names: (families', groups'). carried: what was spent before.
    began: `time.perf_counter()` at second 0; None: when the first graph ran.
    """
    spent = _spent(units.records)
    series = [s.history for s in spent] + [r.history for r in units.records if r.history is not None]
    steps = np.unique(np.concatenate([np.zeros(0, np.int64), *(each.steps for each in series)]))
    every, limit = units.records[0].config.monitor_every, most_points(len(units.of_block))
    stride, kept = thin(steps, max([1, *(each.stride for each in series)]), every=every, limit=limit)
    steps = steps[kept]
    counts = np.stack([s.history.at(steps) for s in spent]) if spent else np.zeros((0, len(steps), 5))
    began = min((s.started for s in spent), default=0.0) if began is None else began
    clock = np.fmax.reduce(counts[..., 0], axis=0, initial=began) - began
    sums = np.nan_to_num(counts[..., 1:]).sum(0) + np.array(carried)
    blocks = [
        np.full((len(steps), 4, r.groups), np.nan, np.float32) if r.history is None else r.history.at(steps)
        for r in units.records
    ]
    values = np.concatenate([np.zeros((len(steps), 4, 0), np.float32), *blocks], axis=2)
    order = np.argsort(units.of_block, kind="stable")
    first = np.searchsorted(units.of_block[order], np.arange(len(units.all)))

    def by_unit(ufunc: np.ufunc, row: int) -> np.ndarray:
        return ufunc.reduceat(values[:, row, order], first, axis=1) if len(first) else values[:, row]

    flops = np.concatenate([np.zeros(0), *(record.flops for record in units.records)])
    return History(
        step=steps,
        seconds=clock,
        total=sums[:, 0],
        saved=sums[:, 1],
        backwards=sums[:, 2],
        guarded=sums[:, 3],
        skipped=(by_unit(np.fmax, 3) > 0.0).sum(1),
        keep=by_unit(np.fmin, 0),
        descent=by_unit(np.add, 1),
        speed=by_unit(np.fmax, 2),
        flops=units.sum(flops),
        family=units.family,
        groups=names[1],
        families=names[0],
        kinds=[family.kind for family in units.families],
        stride=stride,
    )
