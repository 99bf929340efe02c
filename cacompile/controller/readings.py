"""Readings: what one rank measures where ranks decide together, and what rank 0 decides by that of all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from cacompile.config import Config
from cacompile.state.params import ParamState
from cacompile.torch_internals import is_zero1

from .agreed import Agreed
from .decider import Decider, Parts, scores_told


class Readings:
    """Those of one agreement on one rank."""

    def __init__(self) -> None:
        self.fruitless = 0
        """Readings in a row at which nothing could be decided."""
        self._watching: list[Decider] = []
        """Those that read scores here: of all parameters on rank 0, else of those, or shards, that it alone steps."""
        self._last = 0
        self.shards: Parts = {}
        """What this rank's shards had at the last reading."""

    def resume(self, clock: int, shards: Parts) -> None:
        """Go on from a saved state, as if the last reading had been now."""
        self._last, self.shards = clock, shards

    def skip(self) -> None:
        """Nothing is measured in this step."""
        self._watching = []

    def look(self, params: Sequence[ParamState]) -> None:
        """A step begins that ends with a reading: see where these weights are."""
        by_config: dict[Config, list[ParamState]] = {}
        for param in params:
            by_config.setdefault(param.config, []).append(param)
        self._watching = [Decider(each) for each in by_config.values()]
        for decider in self._watching:
            decider.look()

    def measure(self, optimizer: Optimizer | None) -> tuple[dict[int, Any], Parts]:
        """Scores of the parameters that this rank alone steps, or what its shards have: for rank 0."""
        own = own_of(optimizer)
        owner = _owner_of(optimizer, own)
        scores: dict[int, Any] = {}
        parts: Parts = {}
        for decider in self._watching:
            if own is None:
                parts |= decider.parts(owner)
            else:
                decider.measure(owner)
                scores |= scores_told(decider.params, decider.averaged(owner))
        return scores, parts

    def decide(self, optimizer: Optimizer | None, told: Sequence[Mapping[str, Any]], clock: int) -> list[Agreed]:
        """What all ranks take over next. told: what others have said last."""
        # what others have at this reading is on its way, so all shards count as they were at the one before
        shards = [self.shards, *(known["parts"] if known["clock"] == self._last else {} for known in told)]
        self._last, self.shards = clock, {}
        own = own_of(optimizer)
        owner = _owner_of(optimizer, own)
        parts = []
        for decider in self._watching:
            if decider.structure == decider.table.structure:
                parts.append(decider.decide(optimizer, owner, own, told, shards))
                self.shards.update(decider.fresh)
        self.fruitless = 0 if parts else self.fruitless + 1
        return parts


def own_of(optimizer: Optimizer | None) -> set[int] | None:
    """Ids of the parameters that this rank alone steps; None if all ranks step all."""
    if not is_zero1(optimizer):
        return None
    inner: Any = getattr(optimizer, "optim", None)
    return {id(param) for group in inner.param_groups for param in group["params"]}


def _owner_of(optimizer: Optimizer | None, own: set[int] | None) -> Optimizer | None:
    """The optimizer that keeps the state of the parameters that this rank steps. own: see `own_of`."""
    return optimizer if own is None else getattr(optimizer, "optim", None)
