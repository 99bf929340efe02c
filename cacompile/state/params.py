"""The state of one parameter under our care. It belongs to the parameter, not to a graph or a module."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import astuple
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cacompile.config import Config
from cacompile.layout import Partition

from .frozen import Freezable
from .groups import BlockGroup
from .identity import identity_of
from .keys import key_of, new_key
from .measurements import Measurement, NormShares
from .param_counts import ParamCounts
from .pins import Pin
from .series import Series
from .shards import Shard
from .table import BlockTable

if TYPE_CHECKING:
    from .replicas import Replicas
    from .resumed import Resumed

log = logging.getLogger(__name__)

NO_BLOCKS = BlockTable()
"""What a parameter has before it is parted into blocks."""


class ParamState(Freezable, ParamCounts):
    """What is known of one parameter. Made when a session claims it or a compiled graph first runs with it."""

    def __init__(self, param: torch.nn.Parameter, name: str) -> None:
        Freezable.__init__(self)
        ParamCounts.__init__(self)
        self.identity = identity_of(param)
        self.shape = tuple(param.shape)
        self.shard = Shard.of(param)
        """What lies on this rank, of a DTensor; None: all does."""
        self.name = name
        self.key: int | None = None
        """Names it in random draws and fixes the order: given when it is parted, so the same on every rank."""
        self.config = Config()
        self.partition: Partition | None = None
        self.table = NO_BLOCKS
        self.start = 0
        """Its first row in the table; moves when tables are joined."""
        self.history: Series | None = None
        """float32 [4, blocks] at each measurement: keep probability, expected descent, update ratio, skipped."""
        self.step = 0
        """Optimizer steps seen."""
        self.stepped = 0
        """When the last of them was, in the order of this process's steps."""
        self.decided = (0, 0)
        """The controller that has last decided how often its groups are computed, by its number, and after which
        step; 0: none of this process, or the one rank that does it for all."""
        self.optimizer = ""
        """Class of the optimizer that last stepped it."""
        self.pin: Pin | None = None
        self.pinned_at = 0
        """When a holder of pins has decided that, see `pins`; 0: none has, or none could for good."""
        self._pinned: tuple[Pin, int, np.ndarray] | None = None
        self.in_flight: Measurement | None = None
        """Taken over at the next measurement, when its copy from the device is surely complete."""
        self.norm_shares: NormShares | None = None
        """What gradient clipping knows of the blocks."""
        self.sampled: tuple[torch.Tensor, ...] | None = None
        """Which weights `movement.sample` reads: where they are in each dimension, int64 [samples]."""
        self.replicas: Replicas | None = None
        """The ranks that hold copies of it; None: it is this rank's alone, as far as is known."""
        self.place = 0
        """Its number among the parameters of the model that has replicas."""
        self.resumed: Resumed | None = None
        """What a loaded state says of the ranks' agreement, until its optimizer steps."""
        self._deferred: Mapping[str, Any] | None = None
        """Saved state that waits for the partition to be known."""

    @property
    def param(self) -> torch.nn.Parameter | None:
        """The parameter, while it lives."""
        return self.identity.tensor

    @property
    def blocks(self) -> int:
        """Blocks, each of which belongs to a group; 0 before the partition is known."""
        return 0 if self.partition is None else self.partition.blocks

    @property
    def rows(self) -> slice:
        """Its rows in the table."""
        return slice(self.start, self.start + self.blocks)

    @property
    def held(self) -> tuple[int, int]:
        """First and last but one of its parted rows that lie on this rank."""
        assert self.partition is not None
        return (0, self.partition.rows) if self.shard is None else self.shard.rows(self.partition)

    def column(self, name: str) -> np.ndarray:
        """Its part of one of the table's columns, [blocks]; a view."""
        return getattr(self.table, name)[self.start : self.start + self.blocks]

    @property
    def on(self) -> np.ndarray:
        """bool [blocks]: computed in this step. Read only."""
        return self.column("on")

    @property
    def age(self) -> np.ndarray:
        """int64 [blocks]: steps in a row without its gradient, up to the last one."""
        return self.column("age")

    @property
    def skipped(self) -> np.ndarray:
        """bool [blocks]: left out by some backward since the last optimizer step."""
        return self.column("skipped")

    @property
    def flops(self) -> np.ndarray:
        """float [blocks]: dW FLOPs of a step, see `count`."""
        return self.column("flops")

    def join(self, replicas: Replicas, place: int, name: str) -> None:
        """Other ranks hold copies: from now on the mask is what all have agreed on, and all on until they have."""
        self.replicas, self.place, self.name = replicas, place, name
        self.key = key_of(name, place)
        self.table.reorder()
        self.follow()

    def follow(self) -> None:
        """Take the mask that all ranks have agreed on, whatever has changed it here."""
        if self.blocks:
            self.table.set_on(self.rows, self.column("agreed"))
            self.skipped[:] = ~self.column("agreed")

    @property
    def groups(self) -> list[BlockGroup]:
        """For each block, the group that it belongs to."""
        return [self.table.groups[number] for number in self.column("group_of_block")]

    def part(self, partition: Partition, config: Config, name: str) -> bool:
        """Fix the partition, once. False: another graph has parted this parameter otherwise, so the two cannot agree.

        name: the parameter's in the graph, which does not depend on who has asked for its session before.
        """
        if self.partition is not None:
            return self.partition == partition
        self.partition, self.config = partition, config
        if self.key is None:
            self.key = new_key(name)
        BlockTable().add(self)
        self._take_deferred()
        if self.replicas is not None:
            self.follow()
        elif self.pin is not None:
            self.apply_pin()
        return True

    def set_pin(self, pin: Pin | None) -> None:
        """Hold the mask as the pin says, from now on; None: draw it again, from all on. What neither this pin nor the
        last one holds goes on as it was."""
        touched = self.pinned_blocks
        self.pin = pin
        self.apply_pin(touched | self.pinned_blocks)

    @property
    def pinned_blocks(self) -> np.ndarray:
        """bool [blocks]: those that a pin holds."""
        if self.pin is None or not self.blocks:
            return np.zeros(self.blocks, bool)
        return self.pin.held(self.blocks)

    def apply_pin(self, touched: np.ndarray | None = None) -> None:
        """Let the pin, or that there is none, take effect at once. touched: bool [blocks], of which it is to; None: of
        what it holds."""
        if not self.blocks or self.replicas is not None:  # then it is told to all ranks by the one that decides
            return
        held, mask, keep = self.pinned
        touched = held if touched is None else touched
        if self.param is None or self.param.grad is None:  # what was skipped under the pin before is gone
            self.skipped[touched] = False
        self.table.set_on(self.rows, np.where(touched, mask, self.on))
        self.column("keep")[:] = np.where(touched, keep, self.column("keep"))

    @property
    def pinned(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What its pin holds, the mask, and the probabilities that this was drawn with, each [blocks]."""
        if self.pin is None:
            return np.zeros(self.blocks, bool), np.ones(self.blocks, bool), np.ones(self.blocks)
        return self.pinned_blocks, self.pinned_mask(), self.pin.keep_of(self)

    def pinned_mask(self) -> np.ndarray:
        """The pin's mask, bool [blocks], drawn once as long as pin and groups stay."""
        assert self.pin is not None
        if self._pinned is None or self._pinned[:2] != (self.pin, self.table.structure):
            self._pinned = self.pin, self.table.structure, self.pin.mask_of(self)
        return self._pinned[2]

    def to_dict(self) -> dict[str, Any]:
        """Everything that the next draws depend on; before the partition is known, what was loaded."""
        if self.partition is None and self._deferred is not None:
            blocks = {
                name: self._deferred[name]
                for name in ("partition", "skipped", "counted", "step_counted", "blocks", "norm_shares")
            }
        else:
            blocks = {
                "partition": None if self.partition is None else astuple(self.partition),
                "skipped": torch.from_numpy(self.skipped.copy()),
                "counted": torch.from_numpy(self.counted),
                "step_counted": self.step_counted,
                "blocks": self.table.save(self.rows),
                "norm_shares": None if self.norm_shares is None else self.norm_shares.to_dict(),
            }
        pin = None if self.pin is None else astuple(self.pin)
        in_flight = None if self.in_flight is None else self.in_flight.to_dict()
        entry = {"shape": self.shape, "key": self.key, "step": self.step, "counted_from": self.counted_from}
        entry |= {"frozen": self.frozen, "shard": self._place_of_shard}
        return {**entry, "pin": pin, "in_flight": in_flight, **blocks}

    @property
    def _place_of_shard(self) -> tuple[int, int, int] | None:
        """(dim, first, last but one row) of what lies on this rank, which alone some measurements are of."""
        return None if self.shard is None else (self.shard.dim, self.shard.start, self.shard.stop)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Take over a saved state; what it says of blocks waits until the partition is known."""
        if saved["shard"] != self._place_of_shard:
            saved = {**saved, "in_flight": None, "norm_shares": None}
        self.step, self.counted_from = saved["step"], saved["counted_from"]
        if self.replicas is None:  # else it has the one that all ranks give it
            self.key = saved["key"]
        self.pin = None if saved["pin"] is None else Pin(*saved["pin"])
        self.in_flight = None if saved["in_flight"] is None else Measurement.of(saved["in_flight"])
        self._deferred = saved
        self.table.reorder()
        self._take_deferred()
        self.freeze(saved["frozen"])
        if self.replicas is not None:
            self.follow()

    def _take_deferred(self) -> None:
        if self.partition is None or self._deferred is None:
            return
        saved, self._deferred = self._deferred, None
        if saved["partition"] is not None and tuple(saved["partition"]) == astuple(self.partition):
            self.table.load(self.rows, saved["blocks"])
            self.skipped[:] = saved["skipped"].numpy()
            self.carry(saved["counted"].numpy(), saved["step_counted"])
            self.norm_shares = None if saved["norm_shares"] is None else NormShares.of(saved["norm_shares"])
            if self.resumed is not None and (agreed := self.resumed.mask_of(self)) is not None:
                self.column("agreed")[:] = agreed
        else:
            self.table.reset(self.rows)
            self.count_anew()
            self.in_flight = self.norm_shares = None
            if saved["partition"] is not None:
                log.warning(
                    "%s: saved for blocks of %d rows, now parted into blocks of %d; its groups start anew",
                    self.name, saved["partition"][1], self.partition.block)  # fmt: skip
            if self.pin is not None and self.pin.mask is not None:
                self.pin, self.pinned_at = None, 0
        self._hold_frozen()
