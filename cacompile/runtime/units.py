"""Groups as training sees them: blocks of several parameters that are drawn as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from cacompile.names import Named, family_names, group_name

if TYPE_CHECKING:
    from .tracked import Tracked

Member = tuple["Tracked", int]
"""A block of a parameter."""


@dataclass(eq=False, slots=True)
class Kinship:
    """Groups of one kind in one layer; draws are spread evenly over each."""

    kind: str
    kin: str
    """Equal for the same kind in other layers."""
    makers: list[Tracked]
    weights: list[Tracked]
    units: list[Unit] = field(default_factory=list)

    @property
    def key(self) -> tuple[int, int]:
        """Names it in random draws; the same on every rank."""
        record, block = self.units[0].members[0]
        return record.key or 0, block


@dataclass(eq=False, slots=True)
class Unit:
    """One group."""

    family: Kinship
    start: int
    stop: int
    members: list[Member]


@dataclass(frozen=True, slots=True)
class Group:
    """What is to become one unit."""

    start: int
    stop: int
    members: Sequence[Member]


def tie(kind: str, kin: str, makers: Sequence[Tracked], weights: Sequence[Tracked], groups: Sequence[Group]) -> bool:
    """Make each group one unit of one family, with all that its members were tied to before; False if all were so.

    Groups that were tied to one unit before become one. A unit of which some was on is all on.
    """
    if _are_so(kind, groups):
        return False
    units: list[tuple[Group, dict[Member, None]] | None] = []
    place: dict[tuple[int, int], int] = {}
    for group in groups:
        members = dict.fromkeys(m for unit in _units(group.members) for m in unit.members)
        first = group
        for i in sorted({place[id(r), b] for r, b in members if (id(r), b) in place}):
            found = units[i]
            assert found is not None
            first, members, units[i] = min(found[0], first, key=lambda g: g.start), found[1] | members, None
        place.update({(id(r), b): len(units) for r, b in members})
        units.append((first, members))
    family = Kinship(kind, kin, list(makers), list(weights))
    for merged in filter(None, units):
        group, members = merged
        unit = Unit(family, group.start, group.stop, list(members))
        family.units.append(unit)
        on = any(record.state.on[block] for record, block in members)
        for record, block in members:
            record.units[block] = unit
            record.state.on[block] = on
    for record in {id(r): r for unit in family.units for r, _ in unit.members}.values():
        if record not in family.weights:
            family.weights.append(record)
    return True


def _are_so(kind: str, groups: Sequence[Group]) -> bool:
    units = [_units(group.members) for group in groups]
    return all(len(each) == 1 for each in units) and all(
        each[0].family is units[0][0].family and each[0].family.kind == kind for each in units
    )


def by_itself(record: Tracked, blocks: int, block: int, rows: int) -> list[Unit]:
    """Every block of a parameter a group of its own, until it is tied to others."""
    family = Kinship("rows", "", [record], [record])
    starts = range(0, blocks * block, block)
    family.units = [Unit(family, s, min(s + block, rows), [(record, i)]) for i, s in enumerate(starts)]
    return list(family.units)


def _units(members: Iterable[Member]) -> list[Unit]:
    return list({id(unit): unit for record, block in members for unit in [record.units[block]]}.values())


class Units:
    """The units of some parameters, numbered in the order of their blocks."""

    def __init__(self, records: Sequence[Tracked]) -> None:
        self.records = records
        self.all = list({id(unit): unit for record in records for unit in record.units}.values())
        number = {id(unit): i for i, unit in enumerate(self.all)}
        self.of_block = np.array([number[id(unit)] for record in records for unit in record.units], int)
        """int [blocks of all records, in their order]."""
        self.families = list({id(unit.family): unit.family for unit in self.all}.values())
        place = {id(family): i for i, family in enumerate(self.families)}
        self.family = np.array([place[id(unit.family)] for unit in self.all], int)
        """int [units]: index among `families`."""

    def sum(self, blocks: np.ndarray) -> np.ndarray:
        """float [units] of float [blocks]."""
        return np.bincount(self.of_block, blocks, len(self.all))

    def least(self, blocks: np.ndarray) -> np.ndarray:
        """The smallest of each unit's blocks."""
        found = np.full(len(self.all), np.iinfo(np.int64).max if blocks.dtype.kind in "iu" else np.inf, blocks.dtype)
        np.minimum.at(found, self.of_block, blocks)
        return found

    def every(self, blocks: np.ndarray) -> np.ndarray:
        """bool [units]: whether it holds for all of a unit's blocks."""
        found = np.ones(len(self.all), bool)
        np.logical_and.at(found, self.of_block, blocks)
        return found

    def split(self, units: np.ndarray) -> list[np.ndarray]:
        """[units] -> for each record [blocks]."""
        edges = np.cumsum([record.groups for record in self.records])[:-1]
        return np.split(units[self.of_block], edges)

    def names(self, called: Mapping[int, str]) -> tuple[list[str], list[str]]:
        """(families', units') names. called: a record's id -> the parameter's name, of those that have one here."""
        about = [
            Named(
                family.kind,
                tuple(called[id(r)] for r in family.makers if id(r) in called),
                tuple(called[id(r)] for r in family.weights if id(r) in called),
            )
            for family in self.families
        ]
        families = family_names(about)
        return families, [group_name(families[f], u.start, u.stop) for f, u in zip(self.family, self.all)]
