import pytest
import torch
from masking import FIRST_FLAG

from cacompile.kernels import blocks
from cacompile.kernels.blocks import all_on, bundles, live_runs, multiply_runs, pack


def flags(*each: int) -> torch.Tensor:
    return torch.tensor([0] * FIRST_FLAG + list(each) + [0], dtype=torch.uint8)


@pytest.mark.parametrize(
    "each, size, runs",
    (
        ((1, 1, 1), 12, [(0, 12)]),
        ((0, 0, 0), 12, []),
        ((1, 1, 0), 12, [(0, 10)]),
        ((1, 0, 1), 12, [(0, 5), (10, 12)]),
        ((0, 255, 1), 15, [(5, 15)]),
        ((), 0, []),
    ),
)
def test_neighbouring_live_blocks_are_one_run(each, size, runs):
    assert live_runs(flags(*each), FIRST_FLAG, 5, size) == runs
    assert all_on(flags(*each), [0, FIRST_FLAG], [0, 5], [7, size]) == (0 not in each)


def test_a_dimension_that_is_not_masked_is_one_run():
    assert live_runs(flags(), 0, 0, 7) == [(0, 7)]


def test_too_few_flags_are_an_error():
    with pytest.raises(ValueError, match="4 blocks from first_flag 3 on, but 6 flags"):
        live_runs(flags(1, 1), FIRST_FLAG, 5, 20)


def test_flags_may_be_any_view():
    every_second = torch.tensor([1, 0, 0, 0, 1, 0], dtype=torch.uint8)[::2]
    assert live_runs(every_second, 0, 4, 12) == [(0, 4), (8, 12)]


def test_bundles_by_mean_length():
    runs = [(0, 100), (150, 160)]
    assert bundles(runs, 55) == [[(0, 100)], [(150, 160)]]
    assert bundles(runs, 56) == [runs]
    assert bundles(runs, float("inf")) == [runs]
    assert bundles([], 1) == [] and bundles([], float("inf")) in ([], [[]])


@pytest.mark.parametrize("axis", (-2, -1))
@pytest.mark.parametrize("transposed", (False, True))
def test_packing_keeps_the_memory_order(axis, transposed):
    matrix = torch.randn(8, 8).t() if transposed else torch.randn(8, 8)
    packed = pack(matrix, [(0, 2), (5, 8)], axis)
    assert torch.equal(packed, matrix.index_select(axis, torch.tensor([0, 1, 5, 6, 7])))
    assert packed.mT.is_contiguous() == transposed


@pytest.mark.parametrize("long_run", (0.0, 3.0, float("inf")))
@pytest.mark.parametrize("rows", ([(0, 9)], [(0, 2), (3, 9)], [(4, 5)]))
@pytest.mark.parametrize("columns", ([(0, 8)], [(1, 2), (3, 4), (6, 8)]))
def test_every_way_computes_the_same(long_run, rows, columns):
    a, b = torch.randn(9, 6), torch.randn(6, 8)
    expected = torch.zeros(9, 8)
    for top, bottom in rows:
        for left, right in columns:
            expected[top:bottom, left:right] = a[top:bottom] @ b[:, left:right]
    calls = []

    def product(left, right, **out):
        calls.append(left.shape[0] * right.shape[1])
        return torch.mm(left, right, **out)

    torch.testing.assert_close(multiply_runs(product, a, b, [rows, columns], long_run), expected)
    assert sum(calls) == blocks.length(rows) * blocks.length(columns), "more was multiplied than is live"
    if long_run == 0.0:
        assert len(calls) == len(rows) * len(columns)
    elif long_run == float("inf"):
        assert len(calls) == 1
