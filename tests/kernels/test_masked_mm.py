from collections.abc import Callable

import pytest
import torch
from masking import FIRST_FLAG, along, blocks_of
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from cacompile.kernels import masked_mm, masked_mm_reference

DIMS = (0, 1, (0, 1))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = ((1, 63, 129), (63, 129, 300), (129, 300, 1), (300, 1, 63), (300, 129, 63), (600, 5, 7))
LAYOUTS: dict[str, Callable[[int, int], Tensor]] = {
    "rows": torch.randn,
    "columns": lambda m, n: torch.randn(n, m).t(),
    "every second": lambda m, n: torch.randn(m, 2 * n)[:, ::2],
    "repeated": lambda m, n: torch.randn(m, 1).expand(m, n),
}


def operands(m: int, n: int, k: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """A weight gradient's: dy.t() [M, K] and x [K, N]."""
    dy, x = torch.randn(k, m, device=device), torch.randn(k, n, device=device)
    return dy.to(dtype).t(), x.to(dtype)


def test_memory_is_poisoned():
    assert torch.empty(7).isnan().all() and torch.empty(2, 3).new_empty(5).isnan().all()
    assert torch.empty(1).new_empty_strided((2, 3), (1, 2)).isnan().all()


@pytest.mark.thin(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("block", (1, 16, 128))
def test_matches_float64_where_on_and_is_zero_where_off(device, dtype, dim, block, pattern, make_flags, check):
    for m, n, k in SIZES:
        a, b = operands(m, n, k, dtype, device)
        flags = make_flags(pattern, blocks_of((m, n), dim, block))
        exact = a.double() @ b.double()
        masked = along(dim, block, 2)
        out = masked_mm(a, b, flags, None, *masked)
        assert out.is_contiguous() and out.dtype == dtype
        check(out, exact, flags, *masked)
        check(masked_mm_reference(a, b, flags, None, *masked), exact, flags, *masked)


@pytest.mark.thin(4)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("layout_a", LAYOUTS)
@pytest.mark.parametrize("layout_b", LAYOUTS)
def test_takes_any_strides(device, dim, layout_a, layout_b, pattern, make_flags, check):
    a, b = LAYOUTS[layout_a](130, 70).to(device), LAYOUTS[layout_b](70, 90).to(device)
    flags, masked = make_flags(pattern, 9), along(dim, 16, 2)
    check(masked_mm(a, b, flags, None, *masked), a.double() @ b.double(), flags, *masked)


def test_rows_and_columns_in_blocks_and_slots_of_their_own(device, make_flags, check):
    a, b = operands(70, 50, 20, device=device)
    flags, masked = make_flags("mixed", 12), ([FIRST_FLAG, FIRST_FLAG + 2], [7, 16])
    check(masked_mm(a, b, flags, None, *masked), a.double() @ b.double(), flags, *masked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_all_on_is_bit_for_bit_the_library(dtype, dim):
    a, b = operands(300, 129, 63, dtype)
    flags = torch.ones(10, dtype=torch.uint8)
    assert torch.equal(masked_mm(a, b, flags, None, *along(dim, 64, 2)), torch.mm(a, b))


@pytest.mark.parametrize("block", (8, 256))  # put side by side; one product a run
@pytest.mark.parametrize("dim", (0, 1))
def test_a_backward_under_autocast_keeps_its_dtype(dim, block, pattern, make_flags):
    a, b = operands(5 * block, 5 * block, 63)
    flags, masked = make_flags(pattern, 5), along(dim, block, 2)
    expected = masked_mm_reference(a, b, flags, None, *masked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = masked_mm(a, b, flags, None, *masked)
        assert torch.mm(a, b).dtype == torch.bfloat16, "autocast goes on after it"
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("m, n, k", ((4, 6, 0), (0, 6, 3), (4, 0, 3), (0, 0, 0)))
@pytest.mark.parametrize("dim", DIMS)
def test_empty_sizes(device, m, n, k, dim, pattern, make_flags):
    a, b = torch.randn(m, k, device=device), torch.randn(k, n, device=device)
    out = masked_mm(a, b, make_flags(pattern, 3), None, *along(dim, 2, 2))
    assert torch.equal(out, torch.zeros(m, n, device=device))


@pytest.mark.parametrize("dim", (0, 1))
def test_off_blocks_stay_zero_beside_nan(device, dim, make_flags):
    a, b = (torch.full((8, 8), float("nan"), device=device) for _ in range(2))
    out = masked_mm(a, b, make_flags("mixed", 4), None, *along(dim, 2, 2))  # on, off, on, on
    assert not out.narrow(dim, 2, 2).any() and out.narrow(dim, 4, 4).isnan().all()


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("block", (2, 256))  # put side by side; one product a run
def test_off_blocks_cost_nothing(dim, block):
    a, b = operands(8 * block, 8 * block, 4)
    flags = torch.tensor([0] * FIRST_FLAG + [1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.uint8)
    with torch.profiler.profile(with_flops=True) as profile:
        masked_mm(a, b, flags, None, *along(dim, block, 2))
    dense = 8 * block * 8 * block * 4 * 2
    assert sum(event.flops or 0 for event in profile.events()) == dense // (2 if isinstance(dim, int) else 4)


def test_flags_must_reach_far_enough():
    a, b = operands(8, 8, 8)
    with pytest.raises((RuntimeError, ValueError)):
        masked_mm(a, b, torch.ones(4, dtype=torch.uint8), None, [2, 0], [2, 0])


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("with_host", (False, True))
def test_opcheck(device, dim, with_host, make_flags):
    a, b = operands(7, 9, 5, device=device)
    flags = make_flags("mixed", 4)
    torch.library.opcheck(masked_mm, (a, b, flags, flags.cpu() if with_host else None, *along(dim, 3, 2)))


def test_fake_says_what_the_op_does():
    with FakeTensorMode():
        a, b, flags = torch.empty(5, 7).t(), torch.empty(5, 9), torch.empty(8, dtype=torch.uint8)
        out = masked_mm(a, b, flags, None, *along(0, 2, 2))
        assert out.shape == (7, 9) and out.is_contiguous()
        with pytest.raises(RuntimeError):
            masked_mm(a, b.t(), flags, None, *along(0, 2, 2))


def test_compiled_takes_views_as_they_are(device, make_flags):
    flags = make_flags("mixed", 4)

    def weight_grad(dy: Tensor, x: Tensor) -> Tensor:
        return masked_mm(dy.t(), x.t(), flags, None, *along(0, 3, 2))

    dy, x = torch.randn(16, 12, device=device), torch.randn(10, 16, device=device)
    with torch._inductor.config.patch(force_disable_caches=True):  # their key does not know an op's tags
        out, (code,) = run_and_get_code(torch.compile(weight_grad), dy, x)
    torch.testing.assert_close(out, weight_grad(dy, x))
    assert "masked_mm.default(reinterpret_tensor(" in code
    assert "= empty_strided" not in code, "an operand was copied"


def test_compiled_once_for_any_number_of_tokens(device, make_flags):
    flags = make_flags("mixed", 4)
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    masked = along(1, 3, 2)
    compiled = torch.compile(lambda dy, x: masked_mm(dy.t(), x, flags, None, *masked), backend=counter, dynamic=True)
    for tokens in (16, 33, 7):
        dy, x = torch.randn(tokens, 9, device=device), torch.randn(tokens, 12, device=device)
        torch.testing.assert_close(compiled(dy, x), masked_mm_reference(dy.t(), x, flags, None, *masked))
    assert counter.frame_count == 1
