"""Following: what this rank's parameters do of what all ranks have agreed on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cacompile.state.params import ParamState
from cacompile.state.table import BlockTable

from .agreed import Agreed
from .divergence import digest


class Followed:
    """An agreed state, and the rows of this rank's table that follow it."""

    def __init__(self, agreed: Agreed, members: Mapping[int, ParamState]) -> None:
        self.agreed = agreed
        self.params = [members[place] for place in agreed.places]
        self.table = BlockTable.of(self.params)
        self._structure, self._rows = 0, np.zeros(0, np.int64)

    @property
    def rows(self) -> np.ndarray:
        if self._structure != self.table.structure:
            self._structure = self.table.structure
            self._rows = np.concatenate([np.arange(param.rows.start, param.rows.stop) for param in self.params])
        return self._rows

    def show(self) -> None:
        """Let this rank's sessions see what has been measured and decided."""
        for name, values in (*self.agreed.shown.items(), ("keep", self.agreed.keep)):
            getattr(self.table, name)[self.rows] = values
        for param in self.params:
            param.decided = (0, param.step)

    def draw(self, step: int) -> None:
        """The next step's mask, also in the table."""
        self.agreed.draw(step, np.array([param.step for param in self.params]))
        self.follow()

    def follow(self) -> None:
        """Write the state to the table."""
        agreed, rows, table = self.agreed, self.rows, self.table
        table.phase[rows], table.age[rows], table.agreed[rows] = agreed.phase, agreed.age, agreed.on
        table.skipped[rows] = ~agreed.on
        table.set_on(rows, agreed.on)


class Following:
    """All parameters of one agreement, how many steps each has done, and the agreed states that they follow."""

    def __init__(self, members: Sequence[ParamState]) -> None:
        self.members = members
        self._followed: list[Followed] = []
        self._begun = False
        """Whether masks are of this agreement: another one, of an optimizer before, may have left its own."""

    @property
    def step(self) -> int:
        return max(param.step for param in self.members)

    @property
    def steps(self) -> dict[int, int]:
        """Place -> optimizer steps done."""
        return {param.place: param.step for param in self.members}

    def set_steps(self, steps: Mapping[int, int]) -> None:
        for param in self.members:
            since, param.step = param.step, steps.get(param.place, param.step)
            param.counted_from += param.step - since

    def end_step(self) -> None:
        for param in self.members:
            param.step += 1
        if not self._begun:
            self.resume([])
        for followed in self._followed:
            followed.agreed.end_step()

    def draw(self) -> None:
        """The masks of the next step."""
        for followed in self._followed:
            followed.draw(self.step)

    def resume(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Be where others are, or where this rank was; masks too. parts: of `to_list`."""
        self._adopt([Agreed.of(part) for part in parts], {param.place for param in self.members})
        for followed in self._followed:
            followed.follow()

    def take_over(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Follow a new decision, from the next mask on."""
        agreed = [Agreed.of(part) for part in parts]
        before = {place: of for each in self._followed for place, of in each.agreed.by_place().items()}
        for part in agreed:
            part.carry(before)
        self._adopt(agreed, set(before))

    def _adopt(self, parts: Sequence[Agreed], before: set[int]) -> None:
        """Follow these parts. before: places whose masks followed others, and are all on where they do no more."""
        self._begun = True
        members = {param.place: param for param in self.members}
        self._followed = [Followed(part, members) for part in parts]
        for followed in self._followed:
            followed.show()
        for place in before - {place for part in parts for place in part.places}:
            if members[place].blocks:
                members[place].column("agreed")[:] = True
                members[place].follow()

    def to_list(self) -> list[dict[str, Any]]:
        return [each.agreed.to_dict() for each in self._followed]

    def digest(self) -> dict[str, int]:
        """What all ranks have alike, of which each may ask the others."""
        frozen = (
            (param.place, param.is_frozen or np.flatnonzero(param.frozen_blocks).tolist()) for param in self.members
        )
        columns = {"frozen parameters": repr([each for each in frozen if each[1]]).encode()}
        for followed in self._followed:
            columns |= followed.agreed.columns()
        return digest([param.step for param in self.members], columns)
