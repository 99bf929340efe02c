"""The Triton kernel of experts' weight gradients, in Triton's interpreter."""

from typing import Any

import pytest
import torch
from interpreting import TOLERANCE, compare, lay, make_flags

TOKENS = (0, 1, 63, 129, 0)


def case(
    tokens: Any,
    sizes: tuple[int, int],
    blocks: tuple[int, int, int],
    dtype: torch.dtype,
    pattern: str = "mixed",
    layouts: tuple[str, str] = ("turned", "plain"),
    offsets: torch.dtype = torch.int32,
) -> None:
    from cacompile.kernels import masked_grouped_mm_reference
    from cacompile.kernels.triton_grouped import masked_grouped_matmul

    torch.manual_seed(0)
    (m, n), used = sizes, sum(tokens)
    a, b = lay(layouts[0], 1, m, used + 5, dtype)[0], lay(layouts[1], 1, used + 5, n, dtype)[0]
    if "broadcast" not in layouts:
        a[:, used:], b[used:] = torch.nan, torch.nan  # tokens of no expert
    offs = torch.tensor(tokens).cumsum(0).to(offsets)
    flags, first_flags = make_flags((len(tokens), m, n), blocks, pattern)
    out = masked_grouped_matmul(a, b, offs, flags, first_flags, blocks)
    assert out.dtype == dtype and out.is_contiguous()
    exact = masked_grouped_mm_reference(a.double(), b.double(), offs, flags, None, first_flags, blocks)
    compare(out, exact)
    assert torch.equal(masked_grouped_matmul(a, b, offs, flags, first_flags, blocks), out)


@pytest.mark.thin(2)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", ((1, 130), (130, 1), (17, 64), (130, 72)))
@pytest.mark.parametrize("blocks", ((1, 0, 0), (2, 16, 50)))
def test_odd_sizes(interpreter, sizes, blocks, dtype):
    interpreter(case, TOKENS, sizes, blocks, dtype)


@pytest.mark.thin(2)
@pytest.mark.parametrize("blocks", ((0, 0, 0), (1, 0, 0), (0, 128, 0), (0, 0, 50), (1, 64, 128)))
def test_patterns(interpreter, blocks, pattern):
    interpreter(case, (3, 40, 1), (136, 136), blocks, torch.float16, pattern)


@pytest.mark.parametrize("layouts", (("plain", "turned"), ("sliced", "sliced"), ("every other", "broadcast")))
def test_layouts(interpreter, layouts):
    interpreter(case, (40, 0, 9), (72, 72), (1, 64, 0), torch.float16, "mixed", layouts)


def test_wide_offsets(interpreter):
    interpreter(case, (40, 0, 9), (24, 24), (1, 0, 0), torch.float32, "mixed", ("turned", "plain"), torch.int64)


@pytest.mark.parametrize("tokens, sizes", (((), (8, 8)), ((0, 0), (8, 8)), ((3, 4), (0, 8)), ((3, 4), (8, 0))))
def test_nothing_to_multiply(interpreter, tokens, sizes):
    interpreter(case, tokens, sizes, (1, 3, 0), torch.float32)


def nan_case() -> None:
    """Neither NaN in the rows that are off nor offsets beyond the tokens reach what is on."""
    from cacompile.kernels.triton_grouped import masked_grouped_matmul

    a, b = torch.ones(40, 70).t().contiguous().t(), torch.ones(70, 24)
    a[8:24] = torch.nan
    flags = torch.tensor([1, 0, 0, 1, 1], dtype=torch.uint8)
    out = masked_grouped_matmul(a, b, torch.tensor([50, 90], dtype=torch.int32), flags, (0, 0, 0), (0, 8, 0))
    expected = torch.tensor([50.0, 20.0]).view(2, 1, 1).expand(2, 40, 24).clone()
    expected[:, 8:24] = 0
    assert torch.equal(out, expected)
    with pytest.raises(IndexError, match="5 flags for 7 blocks"):
        masked_grouped_matmul(a, b, torch.tensor([50, 70], dtype=torch.int32), flags, (0, 0, 0), (0, 6, 0))


def test_what_is_off_and_what_is_not_there(interpreter):
    interpreter(nan_case)


def far_case() -> None:
    """Strides as those of a slice of something very large."""
    from cacompile.kernels import masked_grouped_mm_reference
    from cacompile.kernels.triton_grouped import masked_grouped_matmul

    a, b = torch.randn(7).as_strided((7, 1), (1, 2**28)), torch.randn(1, 5)
    offs, flags = torch.tensor([0, 1, 1], dtype=torch.int32), torch.tensor([1, 0, 1, 1], dtype=torch.uint8)
    exact = masked_grouped_mm_reference(a.double(), b.double(), offs, flags, None, (0, 0, 0), (0, 2, 0))
    compare(masked_grouped_matmul(a, b, offs, flags, (0, 0, 0), (0, 2, 0)), exact)


def test_far_strides(interpreter):
    interpreter(far_case)
