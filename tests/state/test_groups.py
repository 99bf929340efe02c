"""Groups: blocks of several parameters that are drawn as one, and what is asked of them all at once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from cacompile.state.groups import GroupIndex, GroupMembers, tie
from cacompile.state.params import ParamState
from cacompile.state.table import BlockTable

Params = tuple[ParamState, ParamState, ParamState]


@pytest.fixture
def keep(make: Callable[..., tuple[object, ParamState]]) -> list[object]:
    """Holds the parameters: params know them weakly."""
    return []


@pytest.fixture
def params(make: Callable[..., tuple[object, ParamState]], keep: list[object]) -> Params:
    """up [8, 4] in rows, down [4, 8] in columns, both in blocks of 2; other [4, 4] in blocks of 2."""
    pairs = [make(8, 4, name="up.weight"), make(4, 8, dim=1, name="down.weight"), make(4, 4, name="other.weight")]
    keep += [param for param, _ in pairs]
    up, down, other = (param for _, param in pairs)
    return up, down, other


def neurons(up: ParamState, down: ParamState) -> bool:
    groups = [GroupMembers(2 * i, 2 * i + 2, [(up, i), (down, i)]) for i in range(4)]
    return tie(BlockTable.of([up, down]), "neurons", "role_hash", [up], [up, down], groups)


def called(*params: ParamState) -> dict[int, str]:
    return {id(param): param.name for param in params}


def test_untied_blocks_are_groups_by_themselves(params: Params) -> None:
    index = GroupIndex(params)
    assert index.of_block.tolist() == list(range(10))
    families, names = index.names(called(*params))
    assert families == ["up.rows", "down.rows", "other.rows"]
    assert names[:2] == ["up.rows[0:2]", "up.rows[2:4]"] and names[-1] == "other.rows[2:4]"


def test_tied_blocks_are_one_group(params: Params) -> None:
    up, down, _ = params
    assert neurons(up, down)
    index = GroupIndex(params)
    assert index.of_block.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert index.family.tolist() == [0, 0, 0, 0, 1, 1]
    families, names = index.names(called(*params))
    assert families == ["up.neurons", "other.rows"]
    assert names[3] == "up.neurons[6:8]"


def test_tying_again_changes_nothing(params: Params) -> None:
    up, down, _ = params
    neurons(up, down)
    before = [id(group) for group in up.groups]
    assert not neurons(up, down)
    assert [id(group) for group in up.groups] == before


def test_rows_of_a_part_are_numbered_as_the_graph_numbers_them(params: Params) -> None:
    """Of a weight whose first rows are neurons, and whose last ones nobody knows."""
    up, _, _ = params
    table = BlockTable.of([up])
    assert tie(table, "neurons", "a", [up], [up], [GroupMembers(0, 2, [(up, 0)]), GroupMembers(2, 4, [(up, 1)])])
    assert tie(table, "rows", "b", [up], [up], [GroupMembers(0, 2, [(up, 2)]), GroupMembers(2, 4, [(up, 3)])])
    _, names = GroupIndex([up]).names(called(up))
    assert names == ["up.neurons[0:2]", "up.neurons[2:4]", "up.rows[0:2]", "up.rows[2:4]"]


def test_ties_of_two_graphs_join(params: Params) -> None:
    """One graph ties `up` to `down`, another `up` to `other`: what shares a block is one."""
    up, down, other = params
    neurons(up, down)
    table = BlockTable.of([up, other])
    assert tie(table, "neurons", "role_hash", [up], [up, other], [GroupMembers(0, 4, [(up, 0), (up, 1), (other, 0)])])
    assert {id(group) for group in (*up.groups[:2], *down.groups[:2], other.groups[0])} == {id(up.groups[0])}
    assert up.groups[2] is down.groups[2] and other.groups[1] is not up.groups[0]


def test_a_group_s_blocks_need_not_be_neighbours(params: Params) -> None:
    """As of a fused weight, with gate and up in one."""
    up, down, _ = params
    groups = [GroupMembers(i, i + 1, [(up, i), (up, i + 2), (down, i)]) for i in range(2)]
    tie(BlockTable.of([up, down]), "neurons", "role_hash", [up], [up, down], groups)
    assert GroupIndex([up]).of_block.tolist() == [0, 1, 0, 1]


def test_numbers_of_groups_from_numbers_of_blocks(params: Params) -> None:
    up, down, _ = params
    neurons(up, down)
    index = GroupIndex(params)
    blocks = np.array([1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0, 40.0, 5.0, 6.0])
    assert index.sum(blocks).tolist() == [11, 22, 33, 44, 5, 6]
    assert index.least(blocks).tolist() == [1, 2, 3, 4, 5, 6]
    assert index.least(blocks.astype(int)).tolist() == [1, 2, 3, 4, 5, 6]
    assert index.every(blocks != 20).tolist() == [True, False, True, True, True, True]


def test_split_gives_each_param_its_blocks(params: Params) -> None:
    up, down, _ = params
    neurons(up, down)
    index = GroupIndex(params)
    split = index.split(np.arange(6))
    assert [part.tolist() for part in split] == [[0, 1, 2, 3], [0, 1, 2, 3], [4, 5]]
    assert np.array_equal(np.concatenate(split), index.of_block)


def test_names_leave_out_parameters_that_are_not_here(params: Params) -> None:
    """A session of a part of the model knows no name for the other part's weights."""
    up, down, _ = params
    neurons(up, down)
    families, _ = GroupIndex([down]).names(called(down))
    assert families == ["down.neurons"]


def test_a_turn_is_a_family_or_a_part_of_it_where_it_is_large_or_alone(params: Params):
    up, down, other = params
    neurons(up, down)
    index = GroupIndex([up, down, other])  # 64 of 80 weights are of one family: four parts; the other has two groups
    assert index.family.tolist() == [0, 0, 0, 0, 1, 1]
    assert index.turn.tolist() == [0, 1, 2, 3, 4, 5]
    assert index.turns.tolist() == [4, 4, 4, 4, 2, 2]
    assert GroupIndex([]).turn.tolist() == GroupIndex([]).turns.tolist() == []


def test_layers_of_one_role_take_their_turns_whole(make: Callable[..., tuple[object, ParamState]]):
    pairs = [make(8, 4, name=f"layers.{i}.weight") for i in range(6)]
    states = [state for _, state in pairs]
    for state in states:
        tie(
            BlockTable.of(states),
            "rows",
            "role",
            [state],
            [state],
            [GroupMembers(2 * i, 2 * i + 2, [(state, i)]) for i in range(4)],
        )
    index = GroupIndex(states)
    assert index.turn.tolist() == np.repeat(range(6), 4).tolist() and set(index.turns) == {6}
