"""How fast groups move, from samples: about right, wherever the blocks lie."""

from typing import Any

import numpy as np
import pytest
import torch

from cacompile.controller.movement import SAMPLES, coordinates, moved, sample
from cacompile.layout import Partition


@pytest.mark.parametrize("shape", [(7,), (64, 48), (9, 5, 3, 3), (3, 10, 4)])
@pytest.mark.parametrize("block", [1, 4, 100])
def test_samples_lie_in_their_blocks_and_are_spread(shape: tuple[int, ...], block: int):
    for dim, rows in enumerate(shape):
        partition = Partition(dim, block, rows)
        places = coordinates(partition, shape)
        assert all(((each >= 0) & (each < size)).all() for each, size in zip(places, shape, strict=True))
        of_block = places[dim].reshape(-1, SAMPLES) // block
        assert (of_block == np.arange(partition.blocks)[:, None]).all()
        distinct = len({tuple(place) for place in np.stack(places, 1)[:SAMPLES]})
        assert distinct >= min(SAMPLES, min(block, rows) * int(np.prod(shape)) // rows) // 2


@pytest.mark.parametrize("dim", [0, 1])
def test_each_block_has_its_own_speed(make: Any, dim: int):
    param, state = make(64, 48, dim=dim, block=16)
    before = sample(state)
    size = param.detach().movedim(dim, 0)
    with torch.no_grad():
        for number in range(state.blocks):
            rows = param.movedim(dim, 0)[16 * number : 16 * (number + 1)]
            rows.add_(torch.randn_like(rows) * 0.01 * number)
    share = moved(before, sample(state))
    assert share[0] == 0.0 and size.shape[0] == 16 * state.blocks
    torch.testing.assert_close(share, 0.01 * torch.arange(state.blocks), rtol=0.5, atol=0.0)


def test_zeros_that_begin_to_move_are_infinitely_fast_and_zeros_that_rest_are_at_rest():
    before, now = torch.zeros(2, SAMPLES), torch.zeros(2, SAMPLES)
    now[0] = 1e-8
    assert moved(before, now).tolist() == [float("inf"), 0.0]


def test_what_cannot_be_read_is_not_known(make: Any):
    state = make(8, 2)[1]
    assert state.param is None and sample(state) is None, "nobody else holds it"
