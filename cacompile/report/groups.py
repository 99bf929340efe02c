"""The groups of one model, under the names that its parameters have in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cacompile.names import Named, family_names, group_name
from cacompile.plan import Plan, Slice


@dataclass(frozen=True, slots=True)
class Group:
    """Slices of parameters that are kept or skipped together."""

    name: str
    """`layers.3.mlp.neurons[0:128]`."""
    family: str
    """`layers.3.mlp.neurons`: groups of one kind in one layer."""
    kind: str
    """neurons, heads, filters, experts, tokens or outputs; rows where the graph does not say what they are."""
    kin: str
    """Equal for the same kind in other layers."""
    slices: tuple[Slice, ...]
    """Weights first, then what goes with them and is always computed: biases, norms, embeddings, what stays dense."""
    flops: int
    """dW FLOPs of one backward; counted. 0: nothing of it is ever skipped."""
    share: float
    """Of all dW FLOPs, 0 to 1."""


def list_groups(plans: Sequence[tuple[Plan, Mapping[str, str]]]) -> tuple[tuple[str, ...], tuple[Group, ...]]:
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
            groups.append(Group(text, name, family.kind, family.kin, slices, group.flops, group.flops / total))
        first += len(plan.families)
    return tuple(names[about] for about in named), tuple(groups)
