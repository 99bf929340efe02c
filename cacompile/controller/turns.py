"""Turns: which groups are computed in this step. Pure functions of how often each is, and whose turn it is."""

from __future__ import annotations

import numpy as np

from cacompile.state.draws import generator

ROUNDING = 1e-9


def first_turns(family: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where each group starts on its way to its next turn, float [G] in 0..1: at random, evenly spread over a family.

    family: int [G], equal numbers belong together.
    """
    order = np.lexsort((rng.random(len(family)), family))
    _, first, sizes = np.unique(family[order], return_index=True, return_counts=True)
    phase = np.empty(len(family))
    phase[order] = (np.arange(len(family)) - np.repeat(first, sizes) + np.repeat(rng.random(len(sizes)), sizes)) / (
        np.repeat(sizes, sizes)
    )
    return phase


def take_turns(keep: np.ndarray, phase: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Choose the groups whose turn has come: each as often as its probability says, at distances as equal as can be.

    A group that is kept with probability 1/4 is computed in every fourth step. Independent draws have the same mean
    but long gaps too, in which a parameter runs on along an old gradient (`benchmarks.quality.policies` compares them).

    keep: float [G] in 0..1; phase: float [G] in 0..1. Returns (chosen: bool [G], phase for the next step).
    """
    phase = phase + keep
    chosen = (phase >= 1.0 - ROUNDING) | (keep >= 1.0)
    return chosen, np.clip(phase - chosen, 0.0, 1.0)


def next_turns(
    keep: np.ndarray, phase: np.ndarray, family: np.ndarray, counters: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """`take_turns`, where those that have had none yet start at random.

    phase: float [G], -1 before the first turn; counters: seed and what else names the draw, see `draws.generator`.
    """
    if (new := phase < 0.0).any():
        phase = np.where(new, first_turns(family, generator(*counters)), phase)
    return take_turns(keep, phase)
