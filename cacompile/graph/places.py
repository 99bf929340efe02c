"""Places of gradients among the outputs of a backward: of those that nobody is to get, and of those skipped whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx

from cacompile.passes.truncate import deepest_first, grad_places
from cacompile.state.binding import GraphBinding

from .truncated import TruncatedVersions


class GradPlaces:
    """Which output is which input's gradient, in one backward graph without the handle."""

    def __init__(self, by_position: dict[int, int], deepest: list[int]) -> None:
        self.by_position = by_position
        """Position of an input -> place of its gradient."""
        self.deepest = deepest
        """Places, those first that the backward comes to last."""

    @classmethod
    def of_graph(cls, graph: fx.Graph) -> GradPlaces:
        return cls(grad_places(graph), deepest_first(graph))

    def of(self, positions: Iterable[int]) -> frozenset[int]:
        return frozenset(self.by_position[i] for i in positions if i in self.by_position)

    def none(self, binding: GraphBinding, handle: int) -> frozenset[int]:
        """Places of gradients of what is frozen now, or was in the forward, and of inputs that lead nowhere."""
        return self.of(binding.frozen | binding.handles.call_of(handle).dead)

    def waited_for(self, binding: GraphBinding, handle: int) -> tuple[tuple[int, torch.Tensor], ...]:
        """Places and parameters of gradients that are None, for which hooks wait that torch would call with that."""
        call = binding.handles.call_of(handle)
        waiting = {} if call.detached else binding.hooked(binding.frozen | call.dead)
        return tuple((self.by_position[i], param) for i, param in waiting.items() if i in self.by_position)

    def zeros(
        self, binding: GraphBinding, none: frozenset[int], truncated: TruncatedVersions | None
    ) -> tuple[tuple[int, torch.Tensor], ...]:
        """Places and parameters that are skipped whole, up from where the backward ends or could: no dX for them.

        truncated: says whether it pays.
        """
        off = {self.by_position[i]: param for i, param in binding.skipped_whole.items() if i in self.by_position}
        found: list[tuple[int, torch.Tensor]] = []
        for place in self.deepest if off else ():
            if place in none:
                continue
            if place not in off:
                break
            found.append((place, off[place]))
        pays = found and truncated and truncated.pays(none, frozenset(place for place, _ in found))
        return tuple(found) if pays else ()

    def count_cut(self, binding: GraphBinding, sizes: Sequence[int], places: frozenset[int]) -> None:
        """These gradients are None, and what only they need is not computed: not because a mask says so."""
        positions = (i for i, place in self.by_position.items() if place in places) if places else ()
        binding.count_cut(sizes, frozenset(positions))
