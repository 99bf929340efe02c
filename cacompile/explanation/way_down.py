"""How far down a backward goes while parameters are frozen, and what keeps the way open."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from cacompile.passes.plan import Plan
from cacompile.passes.truncate import deepest_first, grad_places, kept_nodes


def way_down(plan: Plan, backward: fx.Graph, frozen: Collection[str], called: Mapping[str, str]) -> str:
    """A sentence; empty if nothing of the graph is frozen.

    frozen: the model's names of parameters; called: the graph's name of a parameter -> the model's.
    """
    places = grad_places(backward)
    names = {places[p.index]: called.get(p.name, p.name) for p in plan.params if p.index in places}
    none = {place for place, name in names.items() if name in frozen}
    if not none:
        return ""
    left, every = kept_nodes(backward, none)
    text = f"{len(none)} of {len(names)} parameters frozen: the backward computes {left} of {every} nodes"
    order = [place for place in deepest_first(backward) if place not in none]
    if not order:
        return text
    lowest = order[0]
    deepest = deepest_first(backward)
    above = [names[place] for place in deepest[deepest.index(lowest) :] if place in none]
    text += f", down to the gradient of {names.get(lowest, 'an input')}"
    if above:
        text += f"; {above[0]}" + (f" and {len(above) - 1} more" if above[1:] else "")
        text += " lie above it and keep no dX out: the way down stays open"
    return text
