"""Families and groups by name, with the slices that they are, and the axes that parameters share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from cacompile.names import Named, family_names, group_name

from .coupling.components import Components
from .owned import Owned, run
from .plan import ParamFamily, ParamGroup, SharedAxis, Slice
from .roles import role_hashes


def name_families(used: Sequence[Owned], components: Components) -> tuple[list[ParamFamily], list[ParamGroup]]:
    """Named, in the order of the parameters; sets where each part's groups begin."""
    role_hash = role_hashes(components, [part.leaf for part in used])
    named = [Named(part.kind, _makers(part, components), _weights(part)) for part in used]
    families: list[ParamFamily] = []
    groups: list[ParamGroup] = []
    for part, name, about, relatives in zip(used, family_names(named), named, role_hash):
        part.first = len(groups)
        scale = 1 if part.kind in ("heads", "experts") else _scale(part)
        for number, slices in enumerate(_slices(part)):
            before = 0 if part.cut is None else part.cut.index * part.leaf.size
            first, last = before + number * part.units, before + min((number + 1) * part.units, part.leaf.size)
            start, stop = first * scale, last * scale
            groups.append(ParamGroup(group_name(name, start, stop), start, stop, tuple(slices), len(families)))
        families.append(ParamFamily(name, part.kind, about.makers, about.weights, relatives))
    return families, groups


def shared_axes(components: Components, used: Sequence[Owned]) -> tuple[SharedAxis, ...]:
    family = {part.leaf: i for i, part in enumerate(used)}
    return tuple(
        SharedAxis(
            "stream" if leaf in components.streams else components.kind(leaf),
            leaf.size,
            tuple(members),
            family.get(leaf, -1),
        )
        for leaf, members in components.members.items()
        if len(members) > 1 or leaf in family
    )


def _scale(part: Owned) -> int:
    """Rows that one unit is in what makes it, such as channels of one group of a group norm."""
    units = [units for _, units in part.slices] or [units for *_, units in part.others]
    return run(units[0])


def _weights(part: Owned) -> tuple[str, ...]:
    return tuple(grad.param.name for grad, _ in part.slices) or tuple(param.name for param, *_ in part.others)


def _makers(part: Owned, components: Components) -> tuple[str, ...]:
    made = [name for layer in components.made[part.leaf] for name in sorted(layer.weights)]
    return tuple(name for name in dict.fromkeys(made) if name in _weights(part))


def _slices(part: Owned) -> list[list[Slice]]:
    """For each group, its stretches of rows in every whole parameter, weights first."""
    found: list[list[Slice]] = [[] for _ in range(part.groups)]
    weights = [(grad.param, grad.dim, units) for grad, units in part.slices]
    for param, dim, units in [*weights, *part.others]:
        cut = param.cut_along(dim)
        before = 0 if cut is None else cut.index * param.shape[dim]
        group = np.where(units >= 0, units // part.units, -1)
        edges = [0, *(np.flatnonzero(np.diff(group)) + 1).tolist(), len(group)]
        for lo, hi in pairwise(edges):
            if group[lo] >= 0:
                found[group[lo]].append(Slice(param.name, dim, before + lo, before + hi))
    return found
