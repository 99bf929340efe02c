import sys
from itertools import pairwise
from unittest import mock

import pytest
import torch
from masking import FIRST_FLAG, along, blocks_of
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode

from cacompile.kernels import masked_grouped_mm, masked_grouped_mm_reference

DIMS = (0, 1, 2, (1, 2), (0, 1, 2))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOKENS = (0, 1, 63, 0, 129)
SIZES = ((1, 17), (17, 1), (64, 130), (130, 64))


def operands(
    m: int,
    n: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    tokens: tuple[int, ...] = TOKENS,
    spare: int = 7,
) -> tuple[Tensor, Tensor, Tensor]:
    """A weight gradient's: dy [S, M] seen as [M, S], x [S, N], and offsets; the last tokens, of no expert, are NaN."""
    used = sum(tokens)
    dy, x = torch.randn(used + spare, m, device=device), torch.randn(used + spare, n, device=device)
    dy[used:], x[used:] = torch.nan, torch.nan
    offs = torch.tensor(tokens, device=device).cumsum(0).to(torch.int32)
    return dy.to(dtype).t(), x.to(dtype), offs


def exact_product(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    spans = pairwise([0, *offs.tolist()])
    return torch.stack([a[:, lo:hi].double() @ b[lo:hi].double() for lo, hi in spans])


@pytest.mark.thin(4)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("block", (1, 2, 50))
def test_matches_float64_where_on_and_is_zero_where_off(device, dtype, dim, block, pattern, make_flags, check):
    for m, n in SIZES:
        a, b, offs = operands(m, n, dtype, device)
        flags, masked = make_flags(pattern, blocks_of((len(TOKENS), m, n), dim, block)), along(dim, block, 3)
        exact = exact_product(a, b, offs)
        for op in (masked_grouped_mm, masked_grouped_mm_reference):
            for host in (None, flags.cpu()):
                out = op(a, b, offs, flags, host, *masked)
                assert out.is_contiguous() and out.dtype == dtype
                check(out, exact, flags, *masked)


@pytest.mark.parametrize("dim", DIMS)
def test_takes_any_strides(device, dim, pattern, make_flags, check):
    base, other = torch.randn(30, 40, device=device), torch.randn(60, 50, device=device)
    offs, flags, masked = torch.tensor([9, 9, 20], device=device), make_flags(pattern, 60), along(dim, 1, 3)
    for a in (base, base[:, ::2], base[:, :1].expand(30, 20)):
        for b in (other[::2, ::2], other.t(), other[:1].expand(40, 50)):
            a, b = a[:, :20], b[:20]
            check(masked_grouped_mm(a, b, offs, flags, None, *masked), exact_product(a, b, offs), flags, *masked)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_all_on_is_bit_for_bit_the_library(device, dtype):
    flags, masked = torch.ones(200, dtype=torch.uint8, device=device), along((0, 1, 2), 1, 3)
    for m, n, cut in ((8, 64, 64), (128, 136, 136), (128, 136, 131)):  # the last: the library pads the rows
        a, b, offs = operands(m, n, dtype, device, (0, 1, 63, 0, 128))
        out = masked_grouped_mm(a, b[:, :cut], offs, flags, flags.cpu(), *masked)
        expected = torch._grouped_mm(a, b[:, :cut], offs)
        assert torch.equal(out, expected) and out.is_contiguous()
        assert out.stride() == expected.stride() or cut < n


def loop_of_products(inputs: Tensor, weight: Tensor, offs: Tensor, grad: Tensor) -> Tensor:
    """The weight gradient as transformers::grouped_mm_fallback_backward computes it; weight: [E, in, out]."""
    grad_weight = torch.zeros_like(weight)
    start = 0
    for i, end in enumerate(offs.tolist()):
        if start == end:
            continue
        torch.mm(inputs[start:end].T, grad[start:end], out=grad_weight[i])
        start = end
    return grad_weight


@pytest.mark.parametrize("dtype", DTYPES)
def test_live_experts_are_bit_for_bit_those_of_a_loop(device, dtype, pattern, make_flags):
    """Whichever way the weight lies: `a` is then what the rows of memory belong to."""
    flags, masked = make_flags(pattern, len(TOKENS)), along(0, 1, 3)
    live = flags[FIRST_FLAG : FIRST_FLAG + len(TOKENS)].bool()
    if device == "cuda" and pattern not in ("on", "off"):
        pytest.skip("a kernel of ours")
    for m, n in ((1, 1), (1, 64), *SIZES, (128, 256)):
        grad_t, inputs, offs = operands(m, n, dtype, device)
        plain = torch.empty(len(TOKENS), n, m, dtype=dtype, device=device)
        turned = torch.empty(len(TOKENS), m, n, dtype=dtype, device=device).mT
        for weight in (plain, turned):
            a, b = (inputs.t(), grad_t.t()) if weight.is_contiguous() else (grad_t, inputs)
            expected = loop_of_products(inputs, weight, offs, grad_t.t())
            out = masked_grouped_mm(a, b, offs, flags, flags.cpu(), *masked)
            out = out if weight.is_contiguous() else out.mT
            assert torch.equal(out[live], expected[live]) and not out[~live].any()
            assert out.stride() == expected.stride() or 1 in (m, n)


@pytest.mark.parametrize("dim", DIMS)
def test_a_backward_under_autocast_keeps_its_dtype(dim, pattern, make_flags):
    a, b, offs = operands(5, 5)
    flags, masked = make_flags(pattern, 5), along(dim, 1, 3)
    expected = masked_grouped_mm_reference(a, b, offs, flags, None, *masked)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = masked_grouped_mm(a, b, offs, flags, None, *masked)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("m, n, tokens", ((6, 5, (0, 0)), (6, 3, ()), (0, 3, (2, 3)), (3, 0, (2, 3))))
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("spare", (0, 7))
def test_empty_sizes(device, m, n, tokens, dim, spare, pattern, make_flags):
    a, b, offs = operands(m, n, torch.float32, device, tokens, spare)
    flags = make_flags(pattern, 6)
    out = masked_grouped_mm(a, b, offs, flags, flags.cpu(), *along(dim, 1, 3))
    assert torch.equal(out, torch.zeros(len(tokens), m, n, device=device))


@pytest.mark.parametrize("dim", DIMS)
def test_off_blocks_cost_nothing(dim):
    a, b, offs = operands(8, 8, tokens=(4,) * 8)
    flags = torch.tensor([0] * FIRST_FLAG + [1, 0, 0, 1, 1, 0, 1, 0], dtype=torch.uint8)
    first_flags, blocks = along(dim, 1, 3)
    with torch.profiler.profile(with_flops=True) as profile:
        masked_grouped_mm(a, b, offs, flags, None, first_flags, blocks)
    assert sum(event.flops or 0 for event in profile.events()) == 8 * 8 * 8 * 4 * 2 // 2 ** sum(blocks)


def test_operands_that_do_not_match_are_refused(device):
    a, b, offs = operands(4, 6, device=device)
    flags = torch.ones(9, dtype=torch.uint8, device=device)
    for wrong in ((a, b[1:], offs), (a, b.double(), offs), (a[None], b, offs), (a, b, offs[:, None])):
        with pytest.raises(ValueError, match="masked grouped product"):
            masked_grouped_mm(*wrong, flags, flags.cpu(), *along(0, 1, 3))
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        masked_grouped_mm(a, b, offs, flags[:7], flags[:7].cpu(), *along(0, 1, 3))


@pytest.mark.parametrize("dim", DIMS)
def test_opcheck(device, dim, make_flags):
    a, b, offs = operands(7, 9, device=device)
    torch.library.opcheck(masked_grouped_mm, (a, b, offs, make_flags("mixed", 9), None, *along(dim, 1, 3)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_says_what_the_op_does(dtype):
    with FakeTensorMode():
        a, b, offs = operands(7, 9, dtype)
        out = masked_grouped_mm(a, b, offs, torch.empty(9, dtype=torch.uint8), None, *along(0, 1, 3))
        assert out.shape == (len(TOKENS), 7, 9) and out.is_contiguous() and out.dtype == dtype


def test_compiled_takes_views_as_they_are_for_any_number_of_tokens(device, make_flags):
    flags = make_flags("mixed", 4)

    def weight_grad(dy: Tensor, x: Tensor, offs: Tensor) -> Tensor:
        return masked_grouped_mm(dy.t(), x, offs, flags, None, *along(0, 1, 3))

    compiled = torch.compile(weight_grad, dynamic=True)
    for tokens in ((3, 0, 9, 4), (1, 5, 1, 0)):
        a, b, offs = operands(12, 10, torch.float32, device, tokens)
        if tokens[0] == 3:
            with torch._inductor.config.patch(force_disable_caches=True):  # their key does not know an op's tags
                out, (code,) = run_and_get_code(compiled, a.t(), b, offs)
            assert "masked_grouped_mm.default(reinterpret_tensor(" in code
            assert "= empty_strided" not in code, "an operand was copied"
        else:
            with torch.compiler.set_stance("fail_on_recompile"):
                out = compiled(a.t(), b, offs)
        torch.testing.assert_close(out, weight_grad(a.t(), b, offs))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float64))
@pytest.mark.parametrize("with_host", (True, False))
def test_what_runs_on_a_gpu(monkeypatch, dtype, with_host, pattern):
    """Tried on CPU tensors, with something that tells instead of the kernel."""
    on = {"on": [1, 1, 1], "off": [0, 0, 0], "one": [0, 0, 1], "mixed": [1, 0, 1]}[pattern]
    a, b, offs = operands(16, 8, dtype, tokens=(5, 0, 4))
    flags, tile = torch.tensor(on, dtype=torch.uint8), mock.Mock()
    monkeypatch.setitem(sys.modules, "cacompile.kernels.triton_grouped", mock.Mock(masked_grouped_matmul=tile))
    host, masked = flags.clone() if with_host else None, ([0, 0, 0], [1, 0, 0])
    out = sys.modules["cacompile.kernels.masked_grouped_mm"]._cuda(a, b, offs, flags, host, *masked)
    if dtype == torch.bfloat16 and (host is None or pattern in ("one", "mixed")):
        assert out is tile.return_value
        tile.assert_called_once_with(a, b, offs, flags, *masked)
    else:
        tile.assert_not_called()
        assert torch.equal(out, masked_grouped_mm_reference(a, b, offs, flags, None, *masked))
