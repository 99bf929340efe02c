"""Masks that stay until they are ended: given outright, or drawn once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .draws import draw, generator

if TYPE_CHECKING:
    from .groups import BlockFamily
    from .params import ParamState


@dataclass(frozen=True, slots=True)
class Pin:
    """One parameter's mask that stays: `mask` itself, or drawn from `keep` and `seed`."""

    mask: tuple[bool | None, ...] | None = None
    """None for a block: it is not held."""
    keep: float = 1.0
    seed: int = 0

    def mask_of(self, param: ParamState) -> np.ndarray:
        """The mask of one parameter's blocks, bool [blocks]; the same for all of a group, whatever else is pinned.

        True for what it does not hold.
        """
        if self.mask is not None:
            return np.array([on is not False for on in self.mask], bool)
        drawn: dict[int, dict[int, bool]] = {}
        for group in param.groups:
            if id(group.family) not in drawn:
                drawn[id(group.family)] = self._draw(group.family)
        return np.array([drawn[id(group.family)][id(group)] for group in param.groups], bool)

    def held(self, blocks: int) -> np.ndarray:
        """bool [blocks]: those that it holds."""
        return np.ones(blocks, bool) if self.mask is None else np.array([on is not None for on in self.mask], bool)

    def keep_of(self, param: ParamState) -> np.ndarray:
        """The probabilities that the mask was drawn with, float [blocks]; of a given mask, the mask itself."""
        return np.full(param.blocks, self.keep) if self.mask is None else self.mask_of(param).astype(float)

    def _draw(self, family: BlockFamily) -> dict[int, bool]:
        keep = np.full(len(family.groups), self.keep)
        chosen = draw(keep, np.zeros(len(keep), int), generator(self.seed, *family.key))
        return dict(zip(map(id, family.groups), map(bool, chosen)))


class PinHolder(Protocol):
    """Who pins parameters, those that come later as well: a session."""

    pinned_at: int
    """When it last said what is pinned, or that nothing is, in the order of all holders."""

    def hold_pin(self) -> None:
        """Pin what has come under the holder since, and has not been pinned later by another."""


_holders: weakref.WeakSet[PinHolder] = weakref.WeakSet()
_newest = 0


def attend(holder: PinHolder) -> None:
    """Have `hold_pins` ask this holder from now on, though it may pin nothing."""
    _holders.add(holder)


def next_pin(holder: PinHolder) -> int:
    """The moment of what this holder says now; `hold_pins` asks it from now on."""
    global _newest
    _holders.add(holder)
    _newest += 1
    return _newest


def newest_pin() -> int:
    """A number that grows whenever some holder says what is pinned."""
    return _newest


def hold_pins(*, but: PinHolder | None = None) -> None:
    """Have every parameter that has come to a holder pinned as the newest of its holders says.

    but: one that need not look, as it has just said something; the others then see that.
    """
    for holder in sorted(_holders, key=lambda holder: holder.pinned_at):
        if holder is not but:
            holder.hold_pin()
