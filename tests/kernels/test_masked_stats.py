import pytest
import torch
from masking import SLOT, along, live_entries
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cacompile.kernels import (
    masked_bmm,
    masked_bmm_stats,
    masked_bmm_stats_reference,
    masked_mm,
    masked_mm_stats,
    masked_mm_stats_reference,
)

OPS = {
    2: (masked_mm_stats, masked_mm_stats_reference, masked_mm),
    3: (masked_bmm_stats, masked_bmm_stats_reference, masked_bmm),
}
CASES = ((2, 0), (2, 1), (2, (0, 1)), (3, 0), (3, 1), (3, (1, 2)), (3, (0, 1, 2)))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def operands(rank: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """A [.., 10, 30] seen through a transpose, B [.., 30, 7], and an estimate of their product."""
    batch = (5,) * (rank - 2)
    a, b = torch.randn(*batch, 30, 10, device=device).to(dtype).mT, torch.randn(*batch, 30, 7, device=device).to(dtype)
    return a, b, torch.randn(*batch, 10, 7, device=device).to(dtype)


def exact_sums(dw: Tensor, estimate: Tensor | None, flags: Tensor, slots: list[int], blocks: list[int]) -> Tensor:
    """Block by block, in float64."""
    live = live_entries(dw.shape, flags, slots, blocks).double()
    parts = [block or size for block, size in zip(blocks, dw.shape)]
    counts = [-(-size // part) for size, part in zip(dw.shape, parts)]
    sums = torch.zeros(2, *counts, dtype=torch.float64, device=dw.device)
    for at in torch.cartesian_prod(*map(torch.arange, counts)).tolist():
        here = tuple(slice(i * part, (i + 1) * part) for i, part in zip(at, parts))
        mine = dw[here].double() * live[here]
        sums[(0, *at)] = mine.square().sum()
        if estimate is not None:
            sums[(1, *at)] = (mine * estimate[here].double().nan_to_num(0, 0, 0)).sum()
    return sums


@pytest.mark.parametrize("rank, dims", CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_estimate", (True, False))
def test_gives_the_product_and_its_sums(device, rank, dims, dtype, with_estimate, pattern, make_flags, check):
    op, reference, plain = OPS[rank]
    a, b, estimate = operands(rank, dtype, device)
    estimate = estimate if with_estimate else None
    flags, masked = make_flags(pattern, 5), along(dims, 3, rank)
    exact = a.double() @ b.double()
    for which in (op, reference):
        dw, sums = which(a, b, flags, None, *masked, estimate)
        check(dw, exact, flags, *masked)
        expected = exact_sums(dw, estimate, flags, *masked)
        assert sums.dtype == torch.float32 and sums.shape == expected.shape
        torch.testing.assert_close(sums.double(), expected, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3)
        assert not sums[(expected == 0)].any(), "a block that is off has a sum"
    torch.testing.assert_close(op(a, b, flags, None, *masked, estimate)[0], plain(a, b, flags, None, *masked))


def test_an_estimate_gone_astray_stays_in_its_block(device, make_flags):
    a, b, estimate = operands(2, device=device)
    estimate[3:6] = float("inf")  # the second of four blocks, which is off
    estimate[4] = float("nan")
    _, sums = masked_mm_stats(a, b, make_flags("mixed", 4), None, *along(0, 3, 2), estimate)
    assert sums.isfinite().all() and not sums[:, 1].any()
    assert sums[:, 0].all()


@pytest.mark.parametrize("rank, dims", CASES)
def test_all_on_is_bit_for_bit_the_library(rank, dims):
    a, b, estimate = operands(rank)
    dw, _ = OPS[rank][0](a, b, torch.ones(20, dtype=torch.uint8), None, *along(dims, 3, rank), estimate)
    assert torch.equal(dw, a @ b)


@pytest.mark.parametrize("rank, dims", CASES)
def test_opcheck(device, rank, dims, make_flags):
    flags = make_flags("mixed", 5)
    a, b, estimate = operands(rank, device=device)
    torch.library.opcheck(OPS[rank][0], (a, b, flags, None, *along(dims, 3, rank), estimate))
    torch.library.opcheck(OPS[rank][0], (a, b, flags, flags.cpu(), *along(dims, 3, rank), None))


@pytest.mark.parametrize("m, n, k", ((4, 6, 0), (0, 6, 3), (4, 0, 3)))
def test_empty_sizes(device, m, n, k, pattern, make_flags):
    a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
    flags, masked = make_flags(pattern, 3), along((0, 1), 2, 2)
    dw, sums = masked_mm_stats(a, b, flags, None, *masked, torch.ones(m, n, device=device))
    assert torch.equal(dw, torch.zeros(m, n, device=device))
    assert torch.equal(sums, torch.zeros(2, -(-m // 2), -(-n // 2), device=device))


def test_a_backward_under_autocast_keeps_its_dtype(make_flags):
    a, b, estimate = operands(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dw, sums = masked_mm_stats(a, b, make_flags("mixed", 5), None, *along(0, 3, 2), estimate)
    assert dw.dtype == sums.dtype == torch.float32


def test_off_blocks_cost_nothing():
    a, b, _ = operands(2)
    flags = torch.tensor([0] * SLOT + [1, 0, 0, 1, 0], dtype=torch.uint8)
    with torch.profiler.profile(with_flops=True) as profile:
        masked_mm_stats(a, b, flags, None, *along(0, 2, 2), None)
    products = [event for event in profile.events() if event.name == "aten::mm"]
    assert sum(event.flops or 0 for event in products) == 4 * 7 * 30 * 2


def test_fake_says_what_the_op_does():
    with FakeTensorMode():
        a, b, flags = torch.empty(5, 2, 7).mT, torch.empty(5, 2, 9), torch.empty(8, dtype=torch.uint8)
        dw, sums = masked_bmm_stats(a, b, flags, None, [0, 1, 0], [0, 3, 2], None)
        assert dw.shape == (5, 7, 9) and sums.shape == (2, 1, 3, 5) and sums.dtype == torch.float32
