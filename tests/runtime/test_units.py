"""Units: blocks of several parameters that are one group, and what is asked of them all at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cacompile.runtime.tracked import Tracked
from cacompile.runtime.units import Group, Units, tie

Records = tuple[Tracked, Tracked, Tracked]


@pytest.fixture
def keep(make: Callable[..., tuple[object, Tracked]]) -> list[object]:
    """Holds the parameters: records know them weakly."""
    return []


@pytest.fixture
def records(make: Callable[..., tuple[object, Tracked]], keep: list[object]) -> Records:
    """up [8, 4] in rows, down [4, 8] in columns, both in blocks of 2; other [4, 4] in blocks of 2."""
    pairs = [make(8, 4, name="up.weight"), make(4, 8, dim=1, name="down.weight"), make(4, 4, name="other.weight")]
    keep += [param for param, _ in pairs]
    up, down, other = (record for _, record in pairs)
    return up, down, other


def neurons(up: Tracked, down: Tracked) -> bool:
    groups = [Group(2 * i, 2 * i + 2, [(up, i), (down, i)]) for i in range(4)]
    return tie("neurons", "kin", [up], [up, down], groups)


def called(*records: Tracked) -> dict[int, str]:
    return {id(record): record.name for record in records}


def test_untied_blocks_are_groups_by_themselves(records: Records) -> None:
    units = Units(records)
    assert units.of_block.tolist() == list(range(10))
    families, names = units.names(called(*records))
    assert families == ["up.rows", "down.rows", "other.rows"]
    assert names[:2] == ["up.rows[0:2]", "up.rows[2:4]"] and names[-1] == "other.rows[2:4]"


def test_tied_blocks_are_one_group(records: Records) -> None:
    up, down, _ = records
    assert neurons(up, down)
    units = Units(records)
    assert units.of_block.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert units.family.tolist() == [0, 0, 0, 0, 1, 1]
    families, names = units.names(called(*records))
    assert families == ["up.neurons", "other.rows"]
    assert names[3] == "up.neurons[6:8]"


def test_tying_again_changes_nothing(records: Records) -> None:
    up, down, _ = records
    neurons(up, down)
    before = [id(unit) for unit in up.units]
    assert not neurons(up, down)
    assert [id(unit) for unit in up.units] == before


def test_ties_of_two_graphs_join(records: Records) -> None:
    """One graph ties `up` to `down`, another `up` to `other`: what shares a block is one."""
    up, down, other = records
    neurons(up, down)
    assert tie("neurons", "kin", [up], [up, other], [Group(0, 4, [(up, 0), (up, 1), (other, 0)])])
    assert {id(unit) for unit in (*up.units[:2], *down.units[:2], other.units[0])} == {id(up.units[0])}
    assert up.units[2] is down.units[2] and other.units[1] is not up.units[0]


def test_a_group_s_blocks_need_not_be_neighbours(records: Records) -> None:
    """As of a fused weight, with gate and up in one."""
    up, down, _ = records
    tie("neurons", "kin", [up], [up, down], [Group(i, i + 1, [(up, i), (up, i + 2), (down, i)]) for i in range(2)])
    assert Units([up]).of_block.tolist() == [0, 1, 0, 1]


def test_numbers_of_groups_from_numbers_of_blocks(records: Records) -> None:
    up, down, _ = records
    neurons(up, down)
    units = Units(records)
    blocks = np.array([1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0, 5.0, 6.0])
    assert units.sum(blocks).tolist() == [11, 22, 33, 44, 5, 6]
    assert units.least(blocks).tolist() == [1, 2, 3, 4, 5, 6]
    assert units.least(blocks.astype(int)).tolist() == [1, 2, 3, 4, 5, 6]
    assert units.every(blocks != 20).tolist() == [True, False, True, True, True, True]


def test_split_gives_each_record_its_blocks(records: Records) -> None:
    up, down, _ = records
    neurons(up, down)
    units = Units(records)
    split = units.split(np.arange(6))
    assert [part.tolist() for part in split] == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5]]
    assert np.array_equal(np.concatenate(split), units.of_block)


def test_names_leave_out_parameters_that_are_not_here(records: Records) -> None:
    """A session of a part of the model knows no name for the other part's weights."""
    up, down, _ = records
    neurons(up, down)
    families, _ = Units([down]).names(called(down))
    assert families == ["down.neurons"]
