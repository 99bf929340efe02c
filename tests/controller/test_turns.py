"""Turns are spread over the depth and over steps; groups that are computed equally often share theirs."""

import numpy as np
import pytest

from cacompile.controller.turns import first_turns, next_turns, take_turns, together


def network(layers: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """(turn, role) of layers that have a turn of one group, as of heads, and one of some, as of neurons, each."""
    turn = np.concatenate([[2 * layer, *[2 * layer + 1] * groups] for layer in range(layers)])
    return turn, turn % 2


@pytest.mark.parametrize("every", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_in_every_step_some_layers_are_computed_wherever_one_looks(seed: int, every: int):
    turn, role = network(layers=8, groups=3)
    phase = np.full(len(turn), -1.0)
    computed = []
    for step in range(3 * every):
        chosen, phase = next_turns(np.full(len(turn), 1.0 / every), phase, turn, role, (seed, step))
        computed.append(chosen)
    shares = np.array(computed)
    assert (shares.sum(0) == 3).all()  # each as often as it should
    heads = shares[:, role == 0]
    for part in (heads[:, :4], heads[:, 4:], heads):  # of neighbours about as many in each step
        assert np.ptp(part.sum(1)) <= (0 if every != 3 else 2)
    if every == 2:
        assert (heads[:, ::2] != heads[:, 1::2]).all()
    for each in np.unique(turn):  # all of a turn or nothing
        assert np.isin(shares[:, turn == each].mean(1), (0.0, 1.0)).all()


def test_groups_that_are_computed_as_often_go_on_together_and_none_waits_longer():
    turn = np.array([0, 0, 0, 0, 1, 1])
    keep = np.array([0.5, 0.5, 1.0, 0.2, 0.5, 0.5])  # one is always computed, one rarely
    phase = np.array([0.1, 0.7, 0.9, 0.8, 0.2, 0.2])
    assert together(keep, phase, turn).tolist() == [0.7, 0.7, 0.9, 0.8, 0.2, 0.2]
    assert together(np.ones(6), phase, turn).tolist() == phase.tolist()
    assert together(np.ones(0), np.ones(0), np.zeros(0, int)).tolist() == []


def test_first_turns_are_the_same_for_a_seed_and_others_for_another():
    turn, role = network(layers=5, groups=3)
    drawn = [first_turns(turn, role, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert (drawn[0] == drawn[1]).all() and (drawn[0] != drawn[2]).all()
    assert all(((phase >= 0.0) & (phase < 1.0)).all() for phase in drawn)


def test_what_is_always_kept_has_no_turn():
    chosen, phase = take_turns(np.array([1.0, 0.0, 0.5]), np.array([0.3, 0.3, 0.5]))
    assert chosen.tolist() == [True, False, True] and phase == pytest.approx([0.3, 0.3, 0.0])
