"""The groups of all ranks, by what one rank's graph has: each rank has an equal piece of what is cut up among them.

rank 0     mlp.neurons[0:64], mlp.neurons[64:128]         its plan
rank 1     mlp.neurons[128:192], mlp.neurons[192:256]     what rank 0 knows of it: the same, two groups further on
"""

from __future__ import annotations

from dataclasses import replace

from cacompile.names import group_name

from .plan import ParamGroup, Plan, Share, WeightGrad


class Pieces:
    """A plan's groups, those that other ranks have in their places, and which blocks of whole parameters are theirs."""

    def __init__(self, plan: Plan) -> None:
        self.groups: list[ParamGroup] = list(plan.groups)
        """The plan's own first, under the numbers that they have there."""
        self._plan = plan
        self._params = {param.name: param for param in plan.params}
        self._cuts: dict[int, Share] = {}
        """By family."""
        for grad in plan.grads:
            if (cut := grad.param.cut_along(grad.dim)) is not None:
                self._cuts.update(dict.fromkeys((plan.groups[number].family for number in grad.groups), cut))
        self._spans = {family: self._span(family) for family in self._cuts}
        self._elsewhere: dict[tuple[int, int], int] = {}
        """(group, rank) -> the one that this rank has in its place."""

    def groups_of(self, grad: WeightGrad) -> tuple[int, ...]:
        """The group of each block of the whole parameter."""
        cut = grad.param.cut_along(grad.dim)
        if cut is None:
            return grad.groups
        return tuple(self._at(number, rank) for rank in range(cut.pieces) for number in grad.groups)

    def _span(self, family: int) -> int:
        """Units that each rank has of it."""
        own = [group for group in self._plan.groups if group.family == family]
        return max(group.stop for group in own) - min(group.start for group in own)

    def _at(self, number: int, rank: int) -> int:
        group = self._plan.groups[number]
        further = rank - self._cuts[group.family].index
        if not further:
            return number
        if (number, rank) not in self._elsewhere:
            self._elsewhere[number, rank] = len(self.groups)
            self.groups.append(self._moved(group, further))
        return self._elsewhere[number, rank]

    def _moved(self, group: ParamGroup, further: int) -> ParamGroup:
        """The group that another rank has in the place of this one. further: how many ranks on, or back."""
        units = further * self._spans[group.family]
        start, stop = group.start + units, group.stop + units
        slices = []
        for piece in group.slices:
            rows = further * self._params[piece.param].shape[piece.dim]
            slices.append(replace(piece, start=piece.start + rows, stop=piece.stop + rows))
        name = group_name(self._plan.families[group.family].name, start, stop)
        return replace(group, name=name, start=start, stop=stop, slices=tuple(slices))
