"""The block table: everything that is known of the blocks of one model, a row each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .groups import BlockGroup, by_itself

if TYPE_CHECKING:
    from .params import ParamState


class Column(NamedTuple):
    """One column's dtype, and the value of a block of which nothing is known."""

    dtype: type
    fresh: bool | int | float


COLUMNS = {
    "on": Column(bool, True),
    "keep": Column(float, 1.0),
    "phase": Column(float, -1.0),
    "score": Column(float, np.nan),
    "mean_descent": Column(float, np.nan),
    "update_ratio": Column(float, np.nan),
    "descent": Column(float, np.nan),
    "age": Column(np.int64, 0),
    "skipped": Column(bool, False),
    "agreed": Column(bool, True),
    "flops": Column(float, 0.0),
    "frozen": Column(np.int64, -1),
    "kept": Column(bool, False),
    "group_of_block": Column(np.int64, 0),
}

SAVED = ("on", "keep", "phase", "score", "mean_descent", "update_ratio", "descent", "age", "frozen")
"""Columns that a saved state has for each parameter."""

_clock = itertools.count(1)
"""Versions are numbers of the whole process, so that two tables never share one."""

_newest = 0


def newest_structure() -> int:
    """A number that grows whenever blocks or groups of any table change: what was collected before may be stale."""
    return _newest


class BlockTable:
    """Rows of all blocks of the parameters that train together: one model's, or those of models that share any.

    Blocks of one group agree in `on`, `keep`, `phase` and `age`; scores are each block's own. A table owns two
    versions, numbers that no table had before: `mask_version` changes with the mask, `structure` with rows and groups.
    """

    on: np.ndarray
    """bool: the gradient is computed this step. Read only: `set_on` writes it."""
    keep: np.ndarray
    """float: probability with which it is kept in this step, how often its turn comes."""
    phase: np.ndarray
    """float: how far it has come towards its next turn, 0 to 1; -1 before the first."""
    score: np.ndarray
    """float: expected loss decrease per unit of learning rate at the last measurement; NaN before the first."""
    mean_descent: np.ndarray
    """float: expected loss decrease that a step has had so far, late measurements count more; NaN before the first."""
    update_ratio: np.ndarray
    """float: movement in one step over the block's size at the last measurement; NaN before the first."""
    descent: np.ndarray
    """float: `score` times the learning rate of then; NaN before the first. Says why, decides nothing."""
    age: np.ndarray
    """int64: optimizer steps in a row in which its gradient was skipped, up to the last one."""
    skipped: np.ndarray
    """bool: some backward has left its gradient out since the last optimizer step."""
    agreed: np.ndarray
    """bool: where other ranks hold copies, what all of them have agreed to compute in this step; else True."""
    flops: np.ndarray
    """float: dW FLOPs of one backward, in the graph in which the parameter costs most."""
    frozen: np.ndarray
    """int64: the optimizer step after which the user has frozen it; -1: it is trained. Frozen blocks are never on."""
    kept: np.ndarray
    """bool: an option says that it is never skipped."""
    group_of_block: np.ndarray
    """int64: index among `groups`."""

    def __init__(self) -> None:
        self.params: list[ParamState] = []
        """Whose blocks the rows are, in the rows' order."""
        self.groups: list[BlockGroup] = []
        self._fill({name: np.empty(0, column.dtype) for name, column in COLUMNS.items()})

    def __len__(self) -> int:
        return len(self._on)

    @classmethod
    def of(cls, params: Sequence[ParamState]) -> BlockTable:
        """The one table of these parameters, which have blocks; tables that were apart are joined."""
        tables = list({id(param.table): param.table for param in params}.values())
        table = max(tables, key=len)
        if len(tables) > 1:
            table._absorb([other for other in tables if other is not table], params)
        return table

    def add(self, param: ParamState) -> None:
        """Rows for a parameter's blocks, each a group of its own."""
        partition = param.partition
        assert partition is not None
        groups = by_itself(param, partition.blocks, partition.block, partition.rows)
        rows: dict[str, np.ndarray] = {
            name: np.full(len(groups), column.fresh, column.dtype) for name, column in COLUMNS.items()
        }
        rows["group_of_block"] = len(self.groups) + np.arange(len(groups))
        self._append([param], rows)
        self.groups += groups
        self._changed()

    def set_on(self, rows: slice | np.ndarray, on: np.ndarray | bool) -> None:
        """Write the mask of some rows; a new `mask_version` if any of them changes. What is frozen is off."""
        on = on & (self.frozen[rows] < 0)
        if (self._on[rows] != on).any():
            self._on[rows] = on
            self.mask_version = next(_clock)

    def costs(self, rows: slice, flops: np.ndarray) -> None:
        """Note the dW FLOPs of one parameter's blocks, of whichever graph costs most."""
        # a recompilation for other sizes uses the same parameters again, so not a sum
        if len(flops) and flops.max() > self.flops[rows].max():
            self.flops[rows] = flops
            self._changed()

    def regroup(self, groups: Sequence[tuple[BlockGroup, np.ndarray]]) -> None:
        """Move rows to new groups, all on where some was. groups: each with its rows, int [members]."""
        for group, rows in groups:
            self.group_of_block[rows] = len(self.groups)
            self.groups.append(group)
            self.set_on(rows, bool(self._on[rows].any()))
        used, self.group_of_block = np.unique(self.group_of_block, return_inverse=True)
        self.groups = [self.groups[number] for number in used]
        self._changed()

    def reset(self, rows: slice) -> None:
        """Forget what is known of some rows; their groups stay."""
        for name in SAVED:
            if name != "on":
                getattr(self, name)[rows] = COLUMNS[name].fresh
        self.skipped[rows] = False
        self.set_on(rows, True)

    def reorder(self) -> None:
        """Note that parameters have other keys now, by which they are ordered."""
        self._changed()

    def params_of(self, rows: np.ndarray) -> list[ParamState]:
        """The parameters that these rows belong to, in the table's order."""
        starts = np.array([param.start for param in self.params])
        found = np.unique(np.searchsorted(starts, rows, side="right") - 1)
        return [self.params[number] for number in found]

    def load(self, rows: slice, saved: dict[str, torch.Tensor]) -> None:
        """Take over the saved columns of one parameter's rows."""
        for name in SAVED:
            if name != "on":
                getattr(self, name)[rows] = saved[name].numpy()
        self.set_on(rows, saved["on"].numpy())

    def save(self, rows: slice) -> dict[str, torch.Tensor]:
        """Copies of the saved columns of one parameter's rows."""
        return {name: torch.from_numpy(getattr(self, name)[rows].copy()) for name in SAVED}

    def _absorb(self, others: Sequence[BlockTable], wanted: Sequence[ParamState]) -> None:
        """Take over the rows of others, but for those of parameters that are gone and not wanted."""
        alive = [p for other in others for p in other.params if p.param is not None or p in wanted]
        if alive:
            rows = {name: np.concatenate([param.column(name) for param in alive]) for name in COLUMNS}
            groups = [group for param in alive for group in param.groups]
            number = {id(group): len(self.groups) + i for i, group in reversed(list(enumerate(groups)))}
            rows["group_of_block"] = np.array([number[id(group)] for group in groups], np.int64)
            self._append(alive, rows)
            self.groups += groups
        self.regroup(())

    def _append(self, params: Sequence[ParamState], rows: dict[str, np.ndarray]) -> None:
        start = len(self)
        for param in params:
            param.table, param.start = self, start
            start += param.blocks
        self.params += params
        self._fill({name: np.concatenate([getattr(self, name), rows[name]]) for name in COLUMNS})

    def _fill(self, columns: dict[str, np.ndarray]) -> None:
        self._on = columns.pop("on")
        for name, values in columns.items():
            setattr(self, name, values)
        self.on = self._on.view()
        self.on.flags.writeable = False
        self._changed()

    def _changed(self) -> None:
        global _newest
        self.structure = _newest = next(_clock)
        self.mask_version = next(_clock)
