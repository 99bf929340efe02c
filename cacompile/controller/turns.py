"""Turns: which groups are computed in this step. Pure functions of how often each is, and whose turn it is."""

from __future__ import annotations

import numpy as np

from cacompile.state.draws import generator

ROUNDING = 1e-9


GOLDEN = (5**0.5 - 1) / 2
"""Multiples of it, modulo 1, are spread evenly however many there are."""


def first_turns(turn: np.ndarray, role: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where each group starts on its way to its next turn, float [G] in 0..1.

    Spread over the depth: of the turns of one role, the same in other layers, neighbours start half a way apart, and
    the next ones between them. Where the first one starts is random.

    turn, role: int [G], equal numbers belong together; turns are numbered in the order of the layers.
    """
    _, first, of_group = np.unique(turn, return_index=True, return_inverse=True)
    start, seen = np.empty(len(first)), dict.fromkeys(role.tolist(), 0)
    for i, each in enumerate(role[first].tolist()):
        start[i] = _between(seen[each]) + GOLDEN * each
        seen[each] += 1
    return (start[of_group] + rng.random()) % 1.0


def _between(number: int) -> float:
    """0, 1/2, 1/4, 3/4, 1/8 and so on: its binary digits behind the point, in reverse (van der Corput)."""
    return sum(2.0 ** (-1 - digit) for digit in range(number.bit_length()) if number >> digit & 1)


def take_turns(keep: np.ndarray, phase: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the groups whose turn has come: each as often as its probability says, at distances as equal as can be.

    A group that is kept with probability 1/4 is computed in every fourth step. Independent draws have the same mean
    but long gaps too, in which a parameter runs on along an old gradient (`benchmarks.quality.policies` compares them).

    keep: float [G] in 0..1; phase: float [G] in 0..1. Returns (chosen: bool [G], phase for the next step).
    """
    phase = phase + keep
    chosen = (phase >= 1.0 - ROUNDING) | (keep >= 1.0)
    return chosen, np.clip(phase - chosen, 0.0, 1.0)


def together(keep: np.ndarray, phase: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """The phases where the groups of a turn that are computed equally often go on with the furthest of them, float [G].

    Those of them that are computed more often than others of their turn, and not always: those that score alike,
    which share one k. What they miss others learn, and what is left out whole needs neither packing nor filling.

    keep, phase: float [G]; turn: int [G].
    """
    some = keep < 1.0
    shared = np.zeros(turn.max(initial=-1) + 1)
    np.maximum.at(shared, turn[some], keep[some])
    some &= keep == shared[turn]
    furthest = np.zeros(len(shared))
    np.maximum.at(furthest, turn[some], phase[some])
    return np.where(some, furthest[turn], phase)


def next_turns(
    keep: np.ndarray, phase: np.ndarray, turn: np.ndarray, role: np.ndarray, counters: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """`take_turns`, `together`; those that have had none yet start at random.

    phase: float [G], -1 before the first turn; counters: seed and what else names the draw, see `draws.generator`.
    """
    if (new := phase < 0.0).any():
        phase = np.where(new, first_turns(turn, role, generator(*counters)), phase)
    return take_turns(keep, together(keep, phase, turn))
