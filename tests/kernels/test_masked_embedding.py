import pytest
import torch
from masking import SLOT
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cacompile.kernels import masked_embedding_dw, masked_embedding_dw_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
SIZES = (((7,), 1, 1), ((4, 63), 129, 5), ((2, 3, 5), 1000, 33), ((0,), 10, 4))  # shape of indices, rows, D


def operands(
    shape: tuple[int, ...], rows: int, d: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """(grad_out, indices); many tokens share row 0."""
    indices = torch.randint(0, rows, shape, device=device)
    indices[torch.rand(shape, device=device) < 0.3] = 0
    return torch.randn(*shape, d, device=device).to(dtype), indices


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", (1, 16, 128))
@pytest.mark.parametrize("padding_idx", (-1, 0))
def test_matches_float64_where_on_and_is_zero_where_off(device, dtype, block, padding_idx, pattern, make_flags, check):
    for shape, rows, d in SIZES:
        grad_out, indices = operands(shape, rows, d, dtype, device)
        flags = make_flags(pattern, -(-rows // block))
        exact = torch.ops.aten.embedding_dense_backward(grad_out.double(), indices, rows, padding_idx, False)
        for op in (masked_embedding_dw, masked_embedding_dw_reference):
            out = op(grad_out, indices, flags, None, SLOT, block, rows, padding_idx)
            assert out.is_contiguous() and out.dtype == dtype
            check(out, exact, flags, [SLOT], [block])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_on_is_bit_for_bit_the_library(dtype):
    grad_out, indices = operands((4, 63), 129, 5, dtype)
    expected = torch.ops.aten.embedding_dense_backward(grad_out, indices, 129, -1, False)
    flags = torch.ones(200, dtype=torch.uint8)
    assert torch.equal(masked_embedding_dw(grad_out, indices, flags, None, SLOT, 1, 129, -1), expected)


def test_any_strides_and_narrow_indices(device, make_flags, check):
    grad_out = torch.randn(6, 20, 9, device=device).permute(2, 1, 0)
    indices = torch.randint(0, 30, (20, 9), dtype=torch.int32, device=device).t()
    flags = make_flags("mixed", 8)
    exact = torch.ops.aten.embedding_dense_backward(grad_out.double(), indices, 30, -1, False)
    check(masked_embedding_dw(grad_out, indices, flags, None, SLOT, 4, 30, -1), exact, flags, [SLOT], [4])


def test_gradients_of_tokens_whose_rows_are_off_are_not_read(device, make_flags):
    grad_out, indices = operands((50,), 40, 8, device=device)
    flags = make_flags("mixed", 10)
    off = flags[SLOT:][indices // 4] == 0
    grad_out[off] = float("nan")
    assert off.any() and not masked_embedding_dw(grad_out, indices, flags, None, SLOT, 4, 40, -1).isnan().any()


def test_too_few_flags_are_refused(device):
    grad_out, indices = operands((5,), 40, 8, device=device)
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        masked_embedding_dw(grad_out, indices, torch.ones(9, dtype=torch.uint8, device=device), None, 0, 4, 40, -1)


def test_opcheck(device, make_flags):
    grad_out, indices = operands((3, 7), 9, 5, device=device)
    torch.library.opcheck(masked_embedding_dw, (grad_out, indices, make_flags("mixed", 9), None, SLOT, 1, 9, -1))


def test_fake_says_what_the_op_does():
    with FakeTensorMode():
        grad_out, indices = torch.empty(5, 7, 3).to(torch.bfloat16), torch.empty(5, 7, dtype=torch.int64)
        out = masked_embedding_dw(grad_out, indices, torch.empty(9, dtype=torch.uint8), None, 0, 1, 9, -1)
        assert out.shape == (9, 3) and out.dtype == torch.bfloat16 and out.is_contiguous()
