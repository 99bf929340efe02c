import pytest
import torch
from masking import FIRST_FLAG, along, blocks_of
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from cacompile.kernels import masked_bmm, masked_bmm_reference

DIMS = (0, 1, 2, (1, 2), (0, 1, 2))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SIZES = ((1, 63, 129, 5), (5, 63, 1, 129), (3, 129, 65, 1), (12, 1, 63, 33), (2, 300, 5, 4))


def operands(
    e: int, m: int, n: int, k: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """A weight gradient's: dy [E, K, M] seen as [E, M, K], and x [E, K, N]."""
    dy, x = torch.randn(e, k, m, device=device), torch.randn(e, k, n, device=device)
    return dy.to(dtype).mT, x.to(dtype)


@pytest.mark.thin(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("block", (1, 2, 128))
def test_matches_float64_where_on_and_is_zero_where_off(device, dtype, dim, block, pattern, make_flags, check):
    for e, m, n, k in SIZES:
        a, b = operands(e, m, n, k, dtype, device)
        flags = make_flags(pattern, blocks_of((e, m, n), dim, block))
        exact = a.double() @ b.double()
        masked = along(dim, block, 3)
        out = masked_bmm(a, b, flags, None, *masked)
        assert out.is_contiguous() and out.dtype == dtype
        check(out, exact, flags, *masked)
        check(masked_bmm_reference(a, b, flags, None, *masked), exact, flags, *masked)


@pytest.mark.parametrize("dim", DIMS)
def test_takes_any_strides(device, dim, pattern, make_flags, check):
    a = torch.randn(30, 4, 20, device=device).permute(1, 0, 2)
    b = torch.randn(25, 20, 4, device=device).permute(2, 1, 0)
    flags, masked = make_flags(pattern, 30), along(dim, 1, 3)
    check(masked_bmm(a, b, flags, None, *masked), a.double() @ b.double(), flags, *masked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_all_on_is_bit_for_bit_the_library(dtype, dim):
    a, b = operands(4, 63, 129, 33, dtype)
    flags = torch.ones(200, dtype=torch.uint8)
    assert torch.equal(masked_bmm(a, b, flags, None, *along(dim, 1, 3)), torch.bmm(a, b))


@pytest.mark.parametrize("dim", DIMS)
def test_a_backward_under_autocast_keeps_its_dtype(dim, pattern, make_flags):
    a, b = operands(5, 5, 5, 63)
    flags = make_flags(pattern, 5)
    masked = along(dim, 1, 3)
    expected = masked_bmm_reference(a, b, flags, None, *masked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = masked_bmm(a, b, flags, None, *masked)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("e, m, n, k", ((4, 6, 5, 0), (0, 6, 3, 2), (4, 0, 3, 2), (4, 3, 0, 2)))
@pytest.mark.parametrize("dim", DIMS)
def test_empty_sizes(device, e, m, n, k, dim, pattern, make_flags):
    a, b = torch.randn(e, m, k, device=device), torch.randn(e, k, n, device=device)
    out = masked_bmm(a, b, make_flags(pattern, 6), None, *along(dim, 1, 3))
    assert torch.equal(out, torch.zeros(e, m, n, device=device))


@pytest.mark.parametrize("dim", DIMS)
def test_off_blocks_cost_nothing(dim):
    a, b = operands(8, 8, 8, 4)
    flags = torch.tensor([0] * FIRST_FLAG + [1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.uint8)
    first_flags, blocks = along(dim, 1, 3)
    with torch.profiler.profile(with_flops=True) as profile:
        masked_bmm(a, b, flags, None, first_flags, blocks)
    assert sum(event.flops or 0 for event in profile.events()) == 8 * 8 * 8 * 4 * 2 // 2 ** sum(blocks)


@pytest.mark.parametrize("dim", DIMS)
def test_opcheck(device, dim, make_flags):
    a, b = operands(3, 7, 9, 5, device=device)
    torch.library.opcheck(masked_bmm, (a, b, make_flags("mixed", 9), None, *along(dim, 1, 3)))


def test_fake_says_what_the_op_does():
    with FakeTensorMode():
        a, b, flags = torch.empty(2, 5, 7).mT, torch.empty(2, 5, 9), torch.empty(8, dtype=torch.uint8)
        out = masked_bmm(a, b, flags, None, *along(0, 1, 3))
        assert out.shape == (2, 7, 9) and out.is_contiguous()


def test_compiled_takes_views_as_they_are_for_any_number_of_tokens(device, make_flags):
    flags = make_flags("mixed", 4)

    def weight_grad(dy: Tensor, x: Tensor) -> Tensor:
        return masked_bmm(dy.mT, x, flags, None, *along(0, 1, 3))

    compiled = torch.compile(weight_grad, dynamic=True)
    for tokens in (16, 7):
        dy, x = torch.randn(4, tokens, 12, device=device), torch.randn(4, tokens, 10, device=device)
        if tokens == 16:
            with torch._inductor.config.patch(force_disable_caches=True):  # their key does not know an op's tags
                out, (code,) = run_and_get_code(compiled, dy, x)
            assert "masked_bmm.default(reinterpret_tensor(" in code
            assert "= empty_strided" not in code, "an operand was copied"
        else:
            with torch.compiler.set_stance("fail_on_recompile"):
                out = compiled(dy, x)
        torch.testing.assert_close(out, weight_grad(dy, x))
