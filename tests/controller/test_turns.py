"""Turns are spread over the depth, over each family and over steps."""

import numpy as np
import pytest

from cacompile.controller.turns import first_turns, next_turns, take_turns


def network(layers: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(family, role) of layers that have a family of one group, as of heads, and one of some, as of neurons, each."""
    family = np.concatenate([[2 * layer, *[2 * layer + 1] * groups] for layer in range(layers)])
    return family, family % 2


@pytest.mark.parametrize("every", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_in_every_step_some_are_computed_wherever_one_looks(seed: int, every: int):
    family, role = network(layers=8, groups=every)
    phase = np.full(len(family), -1.0)
    computed = []
    for step in range(3 * every):
        chosen, phase = next_turns(np.full(len(family), 1.0 / every), phase, family, role, (seed, step))
        computed.append(chosen)
    shares = np.array(computed)
    assert (shares.sum(0) == 3).all()  # each as often as it should
    heads = shares[:, role == 0]
    for part in (heads[:, :4], heads[:, 4:], heads):  # of neighbours about as many in each step
        assert np.ptp(part.sum(1)) <= (0 if every != 3 else 2)
    if every == 2:
        assert (heads[:, ::2] != heads[:, 1::2]).all()
    for each in np.unique(family[role == 1]):
        assert (shares[:, family == each].sum(1) == 1).all()


def test_first_turns_are_the_same_for_a_seed_and_others_for_another():
    family, role = network(layers=5, groups=3)
    drawn = [first_turns(family, role, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).all()
    assert all(((phase >= 0.0) & (phase < 1.0)).all() for phase in drawn)


def test_what_is_always_kept_has_no_turn():
    chosen, phase = take_turns(np.array([1.0, 0.0, 0.5]), np.array([0.3, 0.3, 0.5]))
    assert chosen.tolist() == [True, False, True] and phase == pytest.approx([0.3, 0.3, 0.0])
