"""The block table: one row a block, one writer of the mask, versions that say what is stale."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from cacompile.state.groups import GroupIndex, GroupMembers, tie
from cacompile.state.table import COLUMNS, SAVED, BlockTable, newest_structure


@pytest.fixture
def pairs(make: Any) -> list[tuple[Any, Any]]:
    """Parameters of 4, 3 and 5 blocks, each in a table of its own, with their states."""
    return [make(2 * blocks, 3, name=f"w{blocks}") for blocks in (4, 3, 5)]


def test_only_the_table_writes_the_mask(pairs: list[Any]):
    state = pairs[0][1]
    with pytest.raises(ValueError, match="read-only"):
        state.on[:] = False
    state.table.set_on(state.rows, np.array([True, False, True, True]))
    assert state.on.tolist() == [True, False, True, True]


def test_the_mask_has_a_new_version_only_if_it_changes(pairs: list[Any]):
    state = pairs[0][1]
    table, seen = state.table, [state.table.mask_version]
    for on, changes in ((True, False), (False, True), (False, False), (np.array([False] * 3 + [True]), True)):
        table.set_on(state.rows, on)
        seen.append(table.mask_version)
        assert (seen[-1] != seen[-2]) == changes
    structure = table.structure
    table.set_on(state.rows, True)
    assert table.structure == structure, "a mask moves no row"


def test_tables_that_are_joined_keep_every_row(pairs: list[Any]):
    for number, (_, state) in enumerate(pairs):
        for name, column in COLUMNS.items():
            if name not in ("on", "frozen", "group_of_block"):  # what is frozen is off
                state.column(name)[:] = np.arange(state.blocks).astype(column.dtype) + number
        state.table.set_on(state.rows, np.arange(state.blocks) % 2 == 0)
    states = [state for _, state in pairs]
    before = [{name: state.column(name).copy() for name in COLUMNS if name != "group_of_block"} for state in states]
    groups, versions = [state.groups for state in states], {state.table.mask_version for state in states}
    table = BlockTable.of(states)
    assert all(state.table is table for state in states) and len(table) == 12 and len(table.groups) == 12
    for state, columns, own in zip(states, before, groups):
        assert all(np.array_equal(state.column(name), values) for name, values in columns.items())
        assert state.groups == own
    assert table.mask_version not in versions, "who has read one of them must look again"
    assert BlockTable.of(states) is table


def test_every_change_of_structure_is_seen(pairs: list[Any], make: Any):
    (_, one), (_, two), _ = pairs
    seen = [newest_structure()]
    made = make(8, 3, name="new")
    seen.append(newest_structure())
    table = BlockTable.of([one, two])
    seen.append(newest_structure())
    tie(table, "neurons", "", [one], [one, two], [GroupMembers(0, 2, [(one, 0), (two, 0)])])
    seen.append(newest_structure())
    table.costs(one.rows, np.full(one.blocks, 1e9))
    seen.append(newest_structure())
    assert len(set(seen)) == len(seen) and made[1].blocks == 4


def test_tied_rows_are_on_if_any_was(pairs: list[Any]):
    (_, one), (_, two), _ = pairs
    table = BlockTable.of([one, two])
    table.set_on(one.rows, np.array([False, False, True, True]))
    table.set_on(two.rows, False)
    tie(table, "neurons", "", [one], [one, two], [GroupMembers(i, i + 1, [(one, i), (two, i)]) for i in range(3)])
    assert one.on.tolist() == [False, False, True, True] and two.on.tolist() == [False, False, True]
    assert GroupIndex([two]).of_block.tolist() == [0, 1, 2] and two.groups == one.groups[:3]
    assert len(table.groups) == 4, "groups without rows are gone"


def test_rows_of_parameters_that_died_are_left_behind(pairs: list[Any], make: Any):
    states = [state for _, state in pairs]
    BlockTable.of(states[:2])
    del pairs[1]
    gc.collect()
    assert states[1].param is None
    other = make(20, 3, name="larger")[1]
    other_param = make(40, 3, name="largest")
    table = BlockTable.of([states[0], other_param[1]])
    assert states[1].table is not table and len(table) == states[0].blocks + other_param[1].blocks
    assert other.table is not table


def test_saved_columns_come_back(pairs: list[Any]):
    (_, one), (_, two), _ = pairs
    table = BlockTable.of([one, two])
    rng = np.random.default_rng(0)
    for name in SAVED:
        values = (rng.random(one.blocks) - 2 * (name == "frozen")).astype(COLUMNS[name].dtype)
        table.set_on(one.rows, values) if name == "on" else one.column(name).__setitem__(slice(None), values)
    saved, others = table.save(one.rows), table.save(two.rows)
    table.reset(one.rows)
    assert one.on.all() and (one.column("phase") == -1.0).all() and np.isnan(one.column("score")).all()
    table.load(one.rows, saved)
    assert all(np.array_equal(one.column(name), saved[name].numpy()) for name in SAVED)
    assert all(np.array_equal(two.column(name), others[name].numpy(), equal_nan=True) for name in SAVED)
