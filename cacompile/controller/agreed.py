"""An agreed state: what the masks of some parameters follow from, the same numbers on all ranks that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cacompile.state.groups import Numbering

from .turns import next_turns

FREE, OFF, ON = -1, 0, 1
"""What a pin says of a block."""

SHOWN = ("score", "mean_descent", "update_ratio", "descent", "flops")
"""Columns that no mask follows from before the next decision: for sessions, which are the same on every rank."""


@dataclass
class Agreed:
    """Parameters of one Config that all ranks have parted alike; one rank has said so, and what to do.

    What changes from step to step follows from it by operations on single numbers, which every machine rounds alike.
    """

    places: list[int]
    """The parameters, by their place in the model."""
    blocks: list[int]
    """How many each has."""
    of_block: np.ndarray
    turn: np.ndarray
    role: np.ndarray
    """Groups, as in `GroupIndex`: as the deciding rank knows them, whatever this one has compiled."""
    seed: int
    key: int
    warmup_steps: int
    max_age: int
    every: int
    """`monitor_every`."""
    keep: np.ndarray
    phase: np.ndarray
    age: np.ndarray
    on: np.ndarray
    pinned: np.ndarray
    """int8 [blocks]: FREE, OFF or ON."""
    readable: np.ndarray
    """bool [blocks]: can be judged though it is skipped."""
    shown: dict[str, np.ndarray]
    """Of `SHOWN`."""

    def to_dict(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Agreed:
        def own(value: Any) -> Any:
            return value.copy() if isinstance(value, np.ndarray) else value

        return cls(**{name: own(value) for name, value in said.items()})

    def carry(self, before: Mapping[int, tuple[np.ndarray, ...]]) -> None:
        """Go on where its parameters are now. before: place -> its (phase, age, on)."""
        start = 0
        for place, blocks in zip(self.places, self.blocks):
            here = slice(start, start + blocks)
            start += blocks
            if place in before and len(before[place][0]) == blocks:
                self.phase[here], self.age[here], self.on[here] = before[place]

    def by_place(self) -> dict[int, tuple[np.ndarray, ...]]:
        """Place -> (phase, age, on)."""
        edges = np.cumsum(self.blocks)[:-1]
        columns = (np.split(column, edges) for column in (self.phase, self.age, self.on))
        return dict(zip(self.places, zip(*columns)))

    def end_step(self) -> None:
        """An optimizer step is done, in which what was off was skipped: on every rank, whatever it has run."""
        self.age = np.where(self.on, 0, np.minimum(self.age + 1, self.max_age))

    def draw(self, step: int, steps: np.ndarray) -> None:
        """The next step's mask. steps: int [parameters], optimizer steps done with each."""
        if step < self.warmup_steps:
            self.on = np.ones(len(self.of_block), bool)
        else:
            index = Numbering(self.of_block, self.turn)
            young = np.repeat(steps < self.warmup_steps, self.blocks)
            keep = index.least(np.where(self.pinned == FREE, self.keep, 1.0))
            phase = index.least(self.phase)
            chosen, phase = next_turns(keep, phase, self.turn, self.role, (self.seed, step, self.key))
            self.phase = phase[self.of_block]
            chosen |= ~index.every((self.age < self.max_age) & ~young)
            if (step + 1) % self.every == 0:
                chosen |= ~index.every(self.readable)
            self.on = chosen[self.of_block]
        self.on = np.where(self.pinned == FREE, self.on, self.pinned == ON)

    def columns(self) -> dict[str, bytes]:
        """What `divergence.digest` takes."""
        parts = self.of_block, self.turn, self.role, self.keep, self.phase, self.age, self.on, self.pinned
        return {f"masks of parameters {self.places[0]} to {self.places[-1]}": b"".join(map(np.ndarray.tobytes, parts))}
