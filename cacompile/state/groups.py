"""Groups as training sees them: blocks of several parameters that are drawn as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from cacompile.names import Named, family_names, group_name

if TYPE_CHECKING:
    from .params import ParamState
    from .table import BlockTable

LARGEST = 0.25
"""Share of all weights that take their turn together at most: in every step most of the network learns."""

FEWEST = 3
"""Turns that the groups of one role have at least, if they are as many: what one misses those of its kind learn."""

Member = tuple["ParamState", int]
"""A block of a parameter."""


@dataclass(eq=False, slots=True)
class BlockFamily:
    """Groups of one kind in one layer; those that are computed equally often take their turn together."""

    kind: str
    role_hash: str
    """Equal for the same kind in other layers."""
    makers: list[ParamState]
    weights: list[ParamState]
    groups: list[BlockGroup] = field(default_factory=list)

    @property
    def key(self) -> tuple[int, int]:
        """Names it in random draws; the same on every rank."""
        param, block = self.groups[0].lead
        return param.key or 0, block


@dataclass(eq=False, slots=True)
class BlockGroup:
    """Units `start:stop` of one family; which blocks belong to it is the table's column `group_of_block`."""

    family: BlockFamily
    start: int
    stop: int
    lead: Member
    """The member that names it."""


@dataclass(frozen=True, slots=True)
class GroupMembers:
    """Blocks that are to become one group."""

    start: int
    stop: int
    members: Sequence[Member]


def by_itself(param: ParamState, blocks: int, block: int, rows: int) -> list[BlockGroup]:
    """A group for every block of a parameter, until it is tied to others."""
    family = BlockFamily("rows", "", [param], [param])
    starts = range(0, blocks * block, block)
    family.groups = [BlockGroup(family, s, min(s + block, rows), (param, i)) for i, s in enumerate(starts)]
    return family.groups


def tie(
    table: BlockTable,
    kind: str,
    role_hash: str,
    makers: Sequence[ParamState],
    weights: Sequence[ParamState],
    groups: Sequence[GroupMembers],
) -> bool:
    """Make each of `groups` one group of one family, with all that its members were tied to; False if all were so.

    Groups that were tied to one before become one. A group of which some was on is all on.
    """
    before = [_numbers(table, group.members) for group in groups]
    if _are_so(table, kind, role_hash, before):
        return False
    merged: list[tuple[GroupMembers, dict[int, None]] | None] = []
    place: dict[int, int] = {}
    for group, numbers in zip(groups, before):
        first = group
        for i in sorted({place[n] for n in numbers if n in place}):
            found = merged[i]
            assert found is not None
            first, numbers, merged[i] = min(found[0], first, key=lambda g: g.start), found[1] | numbers, None
        place.update(dict.fromkeys(numbers, len(merged)))
        merged.append((first, numbers))
    family = BlockFamily(kind, role_hash, list(makers), list(weights))
    regrouped: list[tuple[BlockGroup, np.ndarray]] = []
    rows = _rows_by_group(table)
    for group, numbers in filter(None, merged):
        lead = table.groups[next(iter(numbers))].lead
        made = BlockGroup(family, group.start, group.stop, lead)
        family.groups.append(made)
        regrouped.append((made, np.sort(np.concatenate([rows[number] for number in numbers]))))
    for param in table.params_of(np.concatenate([each for _, each in regrouped])):
        if param not in family.weights:
            family.weights.append(param)
    table.regroup(regrouped)
    return True


def _numbers(table: BlockTable, members: Sequence[Member]) -> dict[int, None]:
    """The groups that these blocks belong to, in the order of the blocks."""
    rows = [param.start + block for param, block in members]
    return dict.fromkeys(table.group_of_block[rows].tolist())


def _rows_by_group(table: BlockTable) -> list[np.ndarray]:
    """The rows of each group."""
    sizes = np.bincount(table.group_of_block, minlength=len(table.groups))
    return np.split(np.argsort(table.group_of_block, kind="stable"), np.cumsum(sizes)[:-1])


def _are_so(table: BlockTable, kind: str, role_hash: str, before: Sequence[Mapping[int, None]]) -> bool:
    if any(len(numbers) != 1 for numbers in before):
        return False
    families = [table.groups[number].family for numbers in before for number in numbers]
    return all(family is families[0] and (family.kind, family.role_hash) == (kind, role_hash) for family in families)


def in_parts(family: np.ndarray, parts: np.ndarray) -> np.ndarray:
    """int [groups]: equal for neighbours of one part, numbered in the order of the families.

    family: int [groups]; parts: int [families], into how many each is cut, no more than it has groups.
    """
    sizes = np.bincount(family, minlength=len(parts))
    order = np.argsort(family, kind="stable")
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return (np.cumsum(parts) - parts)[family] + place * parts[family] // sizes[family]


class Numbering:
    """Which group each of some blocks belongs to."""

    def __init__(self, of_block: np.ndarray, family: np.ndarray) -> None:
        self.of_block = of_block
        """int [blocks]."""
        self.family = family
        """int [groups]: equal numbers belong together."""

    def sum(self, blocks: np.ndarray) -> np.ndarray:
        """float [groups] of float [blocks]."""
        return np.bincount(self.of_block, blocks, len(self.family))

    def least(self, blocks: np.ndarray) -> np.ndarray:
        """The smallest of each group's blocks."""
        largest = np.iinfo(np.int64).max if blocks.dtype.kind in "iu" else np.inf
        found = np.full(len(self.family), largest, blocks.dtype)
        np.minimum.at(found, self.of_block, blocks)
        return found

    def every(self, blocks: np.ndarray) -> np.ndarray:
        """bool [groups]: whether it holds for all of a group's blocks."""
        found = np.ones(len(self.family), bool)
        found[self.of_block[np.logical_not(blocks)]] = False
        return found


class GroupIndex(Numbering):
    """The groups of some parameters, numbered in the order of their blocks."""

    def __init__(self, params: Sequence[ParamState]) -> None:
        self.params = params
        groups = [group for param in params for group in param.groups]
        self.all = list({id(group): group for group in groups}.values())
        number = {id(group): i for i, group in enumerate(self.all)}
        of_block = np.array([number[id(group)] for group in groups], int)
        self.families = list({id(group.family): group.family for group in self.all}.values())
        place = {id(family): i for i, family in enumerate(self.families)}
        super().__init__(of_block, np.array([place[id(group.family)] for group in self.all], int))
        by_family = [(family.kind, family.role_hash) for family in self.families]
        roles = {role: i for i, role in enumerate(dict.fromkeys(by_family))}
        self.role = np.array([roles[role] for role in by_family], int)[self.family]
        """int [groups]: equal for families of one kind that do the same in other layers."""

    @cached_property
    def turn(self) -> np.ndarray:
        """int [groups]: equal for those that take their turn together, numbered in the order of the layers.

        Each family whole, or in as many parts of neighbours as leave none with more than LARGEST of all weights, and
        its role with FEWEST turns.
        """
        if not self.all:
            return np.zeros(0, int)
        of_block = [np.full(param.blocks, prod(param.shape) / param.blocks) for param in self.params if param.blocks]
        weights = self.sum(np.concatenate(of_block))
        share = np.bincount(self.family, weights, len(self.families)) / max(1.0, weights.sum())
        sizes = np.bincount(self.family, minlength=len(self.families))
        role = np.zeros(len(sizes), int)
        role[self.family] = self.role
        fewest = -(-FEWEST // np.bincount(role)[role])
        parts = np.clip(np.maximum(np.ceil(share / LARGEST).astype(int), fewest), 1, sizes)
        return in_parts(self.family, parts)

    @cached_property
    def turns(self) -> np.ndarray:
        """int [groups]: how many turns the groups of its role have, in this layer and in others."""
        of_role = np.zeros(self.turn.max(initial=-1) + 1, int)
        of_role[self.turn] = self.role
        return np.bincount(of_role)[self.role] if len(of_role) else np.zeros(0, int)

    def split(self, groups: np.ndarray) -> list[np.ndarray]:
        """[groups] -> for each parameter [blocks]."""
        edges = np.cumsum([param.blocks for param in self.params])[:-1]
        return np.split(groups[self.of_block], edges)

    def column(self, name: str) -> np.ndarray:
        """A column of the table, [blocks of all parameters, in their order]; a copy."""
        parts = [param.column(name) for param in self.params]
        return np.concatenate(parts) if parts else np.zeros(0)

    def names(self, called: Mapping[int, str]) -> tuple[list[str], list[str]]:
        """(families', groups') names. called: a state's id -> the parameter's name, of those that have one here."""
        about = [
            Named(
                family.kind,
                tuple(called[id(p)] for p in family.makers if id(p) in called),
                tuple(called[id(p)] for p in family.weights if id(p) in called),
            )
            for family in self.families
        ]
        families = family_names(about)
        return families, [group_name(families[f], g.start, g.stop) for f, g in zip(self.family, self.all)]
