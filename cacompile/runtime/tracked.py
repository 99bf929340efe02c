"""One parameter under our care: its groups, their scores, this step's mask. State belongs to parameters, not graphs."""

from __future__ import annotations

import logging
import time
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, fields
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakTensorKeyDictionary

from cacompile.config import Config

from .mask import draw, generator
from .readings import Scores, Shares
from .series import Series
from .units import Kinship, Unit, by_itself

log = logging.getLogger(__name__)


@dataclass(slots=True)
class GroupState:
    """What is known of each block of a parameter. Views into one longer state while a scope draws for several.

    Blocks that belong to one group agree in `on`, `keep`, `due` and `age`; scores are each block's own.
    """

    on: np.ndarray
    """bool: the gradient is computed this step."""
    keep: np.ndarray
    """Probability with which it is kept in this step: how often its turn comes."""
    due: np.ndarray
    """How far it has come towards its next turn, 0 to 1; -1 before the first."""
    score: np.ndarray
    """Expected loss decrease per unit of learning rate at the last reading; NaN before the first."""
    usual: np.ndarray
    """Expected loss decrease that a step has had so far, late readings count more; NaN before the first."""
    speed: np.ndarray
    """Movement in one step over the block's size at the last reading; NaN before the first."""
    age: np.ndarray
    """Optimizer steps in a row in which its gradient was skipped, up to the last one."""

    @classmethod
    def fresh(cls, groups: int) -> GroupState:
        return cls(
            on=np.ones(groups, bool),
            keep=np.ones(groups),
            due=np.full(groups, -1.0),
            score=np.full(groups, np.nan),
            usual=np.full(groups, np.nan),
            speed=np.full(groups, np.nan),
            age=np.zeros(groups, np.int64),
        )

    @classmethod
    def joined(cls, states: list[GroupState]) -> GroupState:
        """One state with all entries, of which each given state becomes a view."""
        if not states:
            return cls.fresh(0)
        whole = cls(**{f.name: np.concatenate([getattr(s, f.name) for s in states]) for f in fields(cls)})
        start = 0
        for state in states:
            stop = start + len(state.on)
            for f in fields(cls):
                setattr(state, f.name, getattr(whole, f.name)[start:stop])
            start = stop
        return whole

    def to_dict(self) -> dict[str, torch.Tensor]:
        return {f.name: torch.from_numpy(getattr(self, f.name).copy()) for f in fields(self)}

    def load(self, saved: dict[str, torch.Tensor]) -> None:
        for f in fields(self):
            getattr(self, f.name)[:] = saved[f.name].numpy()


@dataclass(frozen=True, slots=True)
class Partition:
    """How a parameter is cut: blocks of `block` rows along dimension `dim`, `rows` in all."""

    dim: int
    block: int
    rows: int

    @property
    def groups(self) -> int:
        return -(-self.rows // self.block)

    def spans(self, chosen: np.ndarray) -> Iterator[tuple[int, int]]:
        """(start, length) in rows of each run of chosen groups."""
        edges = np.flatnonzero(np.diff(np.concatenate(([False], chosen, [False])).astype(np.int8)))
        for first, last in edges.reshape(-1, 2):
            start = int(first) * self.block
            yield start, min(int(last) * self.block, self.rows) - start


@dataclass(slots=True)
class Spent:
    """dW FLOPs of one graph with one set of parameters so far; outlives the graph in the parameters' records."""

    total: float = 0.0
    """What dense backwards would have taken."""
    saved: float = 0.0
    backwards: int = 0
    guarded: int = 0
    """Backwards that ran the guarded version."""
    started: float = field(default_factory=time.perf_counter)
    history: Series = field(default_factory=lambda: Series((5,), float))
    """At each reading: the clock in seconds, then `counts`."""

    @property
    def counts(self) -> tuple[float, float, int, int]:
        return self.total, self.saved, self.backwards, self.guarded


class Tracked:
    """The record of one parameter. Made when a session claims it or a compiled graph first runs with it."""

    def __init__(self, param: torch.nn.Parameter, name: str) -> None:
        self.ref = weakref.ref(param)
        self.shape = tuple(param.shape)
        self.name = name
        self.key: int | None = None
        """Names it in random draws and fixes the order: given when it is cut, so the same on every rank."""
        self.config = Config()
        self.partition: Partition | None = None
        self.units: list[Unit] = []
        """For each block, the group that it belongs to."""
        self.state = GroupState.fresh(0)
        self.flops = np.zeros(0)
        """dW FLOPs of one backward, for each block, in the graph in which it costs most."""
        self.spent: list[Spent] = []
        self.history: Series | None = None
        """float32 [4, G] at each reading: probability of being kept, expected descent, speed, whether it is skipped."""
        self.skipped = np.zeros(0, bool)
        """Blocks whose gradient some backward left out since the last optimizer step."""
        self.step = 0
        """Optimizer steps seen."""
        self.stepped = 0
        """When the last of them was, in the order of this process's steps."""
        self.pin: Pin | None = None
        self._pinned: tuple[Pin, int, np.ndarray] | None = None
        self.awaited: Scores | None = None
        """A reading that is taken over at the next one, when its copy from the device is surely complete."""
        self.shares: Shares | None = None
        """What gradient clipping knows of the groups."""
        self.places: tuple[torch.Tensor, ...] | None = None
        """Which weights `drift.sample` reads: where they are in each dimension, int64 [samples]."""
        self.pending: dict[str, Any] | None = None
        """Saved state that waits for the partition to be known."""

    @property
    def groups(self) -> int:
        """Blocks, each of which belongs to a group."""
        return len(self.state.on)

    def cut(self, partition: Partition, config: Config, name: str) -> bool:
        """Fix the partition, once. False: another graph has cut this parameter otherwise, so the two cannot agree.

        name: the parameter's in the graph, which does not depend on who has asked for its session before.
        """
        if self.partition is not None:
            return self.partition == partition
        self.partition, self.config = partition, config
        self.state = GroupState.fresh(partition.groups)
        self.flops = np.zeros(partition.groups)
        self.skipped = np.zeros(partition.groups, bool)
        if self.key is None:
            self.key = registry.new_key(name)
        self.units = by_itself(self, partition.groups, partition.block, partition.rows)
        registry.generation += 1
        self._take_groups()
        if self.pin is not None:
            self.apply_pin()
        return True

    def apply_pin(self) -> None:
        """Let a pin, or its end, take effect at once."""
        if self.groups:
            param = self.ref()
            if param is None or param.grad is None:  # what was skipped under the pin before is gone
                self.skipped[:] = False
            self.state.on[:] = True if self.pin is None else self.pinned_mask()
            self.state.keep[:] = 1.0 if self.pin is None else self.pin.keep_of(self)
            registry.epoch += 1

    def pinned_mask(self) -> np.ndarray:
        """The pin's mask, bool [G], drawn once as long as pin and groups stay."""
        assert self.pin is not None
        if self._pinned is None or self._pinned[:2] != (self.pin, registry.generation):
            self._pinned = self.pin, registry.generation, self.pin.mask_of(self)
        return self._pinned[2]

    def to_dict(self) -> dict[str, Any]:
        """Everything that the next draws depend on; before the partition is known, what was loaded."""
        if self.partition is None and self.pending is not None:
            groups = {name: self.pending[name] for name in ("partition", "skipped", "groups", "shares")}
        else:
            groups = {
                "partition": None if self.partition is None else astuple(self.partition),
                "skipped": torch.from_numpy(self.skipped.copy()),
                "groups": self.state.to_dict(),
                "shares": None if self.shares is None else self.shares.to_dict(),
            }
        pin = None if self.pin is None else astuple(self.pin)
        awaited = None if self.awaited is None else self.awaited.to_dict()
        return {"shape": self.shape, "key": self.key, "step": self.step, "pin": pin, "awaited": awaited, **groups}

    def load(self, saved: dict[str, Any]) -> None:
        """Take over a saved state; what it says of groups waits until the partition is known."""
        self.key, self.step = saved["key"], saved["step"]
        self.pin = None if saved["pin"] is None else Pin(*saved["pin"])
        self.awaited = None if saved["awaited"] is None else Scores.of(saved["awaited"])
        self.pending = saved
        registry.generation += 1
        self._take_groups()

    def _take_groups(self) -> None:
        if self.partition is None or self.pending is None:
            return
        saved, self.pending = self.pending, None
        if saved["partition"] is not None and tuple(saved["partition"]) == astuple(self.partition):
            self.state.load(saved["groups"])
            self.skipped[:] = saved["skipped"].numpy()
            self.shares = None if saved["shares"] is None else Shares.of(saved["shares"])
        else:
            self.state.load(GroupState.fresh(self.groups).to_dict())
            self.skipped[:] = False
            self.awaited = self.shares = None
            if saved["partition"] is not None:
                log.warning(
                    "%s: saved for blocks of %d rows, now cut into blocks of %d; its groups start anew",
                    self.name, saved["partition"][1], self.partition.block)  # fmt: skip
            if self.pin is not None and self.pin.mask is not None:
                self.pin = None
        registry.epoch += 1


@dataclass(frozen=True, slots=True)
class Pin:
    """A mask that stays: given outright, or drawn once from `keep` and `seed`."""

    mask: tuple[bool, ...] | None = None
    keep: float = 1.0
    seed: int = 0

    def mask_of(self, record: Tracked) -> np.ndarray:
        """The mask for one parameter's blocks, bool [G]; the same for all of a group, and whatever else is pinned."""
        if self.mask is not None:
            return np.array(self.mask, bool)
        drawn: dict[int, dict[int, bool]] = {}
        for unit in record.units:
            if id(unit.family) not in drawn:
                drawn[id(unit.family)] = self._draw(unit.family)
        return np.array([drawn[id(unit.family)][id(unit)] for unit in record.units], bool)

    def _draw(self, family: Kinship) -> dict[int, bool]:
        keep = np.full(len(family.units), self.keep)
        chosen = draw(keep, np.zeros(len(keep), int), generator(self.seed, *family.key))
        return dict(zip(map(id, family.units), map(bool, chosen)))

    def keep_of(self, record: Tracked) -> np.ndarray:
        """The probabilities that the mask was drawn with, float [G]; of a given mask, the mask itself."""
        return np.full(record.groups, self.keep) if self.mask is None else np.array(self.mask, float)


class _Registry:
    """Every tracked parameter of the process, by identity, weakly."""

    def __init__(self) -> None:
        self._records = WeakTensorKeyDictionary()
        self._names: Counter[str] = Counter()
        self.generation = 0
        """Grows when a parameter gets groups or others: what was collected before may be incomplete."""
        self.epoch = 0
        """Grows when any mask changes: what was derived from masks before is stale."""

    def all(self) -> list[Tracked]:
        return list(self._records.values())

    def find(self, param: Any) -> Tracked | None:
        return self._records.get(param) if isinstance(param, torch.Tensor) else None

    def track(self, param: torch.nn.Parameter, name: str) -> Tracked:
        record = self._records.get(param)
        if record is None:
            record = self._records[param] = Tracked(param, name)
        return record

    def new_key(self, name: str) -> int:
        """A number for a parameter that a graph calls `name`; identical blocks call theirs alike: they are counted."""
        self._names[name] += 1
        return zlib.crc32(name.encode()) + (self._names[name] - 1 << 32)

    def forget(self) -> None:
        """Names count from zero again, as after `torch._dynamo.reset()`; live parameters keep their state."""
        self._names.clear()


registry = _Registry()
