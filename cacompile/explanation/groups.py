"""The groups of one model, under the names that its parameters have in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

from cacompile.names import Named, family_names, group_name
from cacompile.passes.plan import Plan, Slice

from .facts import ExplainedGroup, Kind


def list_groups(plans: Sequence[tuple[Plan, Mapping[str, str]]]) -> tuple[tuple[str, ...], tuple[ExplainedGroup, ...]]:
    """(names of all families, graph by graph; all groups). A group of two graphs comes twice.

    plans: each with the model's name for each of its own parameter names.
    """
    total = sum(plan.flops for plan, _ in plans) or 1
    named: list[tuple[Named, int]] = []
    for plan, called in plans:
        seen: Counter[Named] = Counter()
        for family in plan.families:
            about = Named(
                family.kind,
                tuple(called.get(name, name) for name in family.makers),
                tuple(called.get(name, name) for name in family.weights),
            )
            named.append((about, seen[about]))
            seen[about] += 1
    # the same family in several graphs has one name, two of one weight in one graph have two
    distinct = list(dict.fromkeys(named))
    names = dict(zip(distinct, family_names([about for about, _ in distinct])))
    groups = []
    first = 0
    for plan, called in plans:
        for group in plan.groups:
            family = plan.families[group.family]
            name = names[named[first + group.family]]
            slices = tuple(Slice(called.get(s.param, s.param), s.dim, s.start, s.stop) for s in group.slices)
            text = group_name(name, group.start, group.stop)
            kind = cast(Kind, family.kind)
            groups.append(ExplainedGroup(text, name, kind, family.role_hash, slices, group.flops, group.flops / total))
        first += len(plan.families)
    return tuple(names[about] for about in named), tuple(groups)
