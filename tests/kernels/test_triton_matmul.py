"""The Triton kernels of products, in Triton's interpreter."""

import itertools
from unittest import mock

import pytest
import torch
from interpreting import (
    BOXES,
    DESCRIPTORS,
    LAYOUTS,
    ODD,
    POINTERS,
    TOLERANCE,
    compare,
    lay,
    make_flags,
    pretend,
)


def product_case(
    sizes: tuple[int, int, int, int],
    blocks: tuple[int, int, int],
    dtype: torch.dtype,
    arch: str = POINTERS,
    pattern: str = "mixed",
    layouts: tuple[str, str] = ("turned", "plain"),
    programs: int = 4,
) -> bool:
    """Whether operands were read through descriptors."""
    from cacompile.kernels import masked_bmm_reference, triton_matmul
    from cacompile.kernels.triton_boxes import Boxes as boxes

    (e, m, n, k), (a_kind, b_kind) = sizes, layouts
    with pretend(arch, programs, "tf32" if arch == DESCRIPTORS else "ieee"):
        a, b = lay(a_kind, e, m, k, dtype), lay(b_kind, e, k, n, dtype)
        flags, first_flags = make_flags((e, m, n), blocks, pattern)
        exact = masked_bmm_reference(a.double(), b.double(), flags, None, first_flags, blocks)
        with mock.patch.object(boxes, "over", autospec=True, side_effect=boxes.over) as over:
            out = triton_matmul.masked_matmul(a, b, flags, first_flags, blocks)
        compare(out, exact)
        assert torch.equal(triton_matmul.masked_matmul(a, b, flags, first_flags, blocks, flags), out)
    return over.called


@pytest.mark.thin(3)
@pytest.mark.parametrize("m, n", itertools.product(ODD, ODD))
def test_odd_sizes(interpreter, m, n):
    """Each pair of them along two of the three dimensions, in both dtypes and read both ways."""
    i, j = ODD.index(m), ODD.index(n)
    k = ODD[(i + j + 2) % 4]
    dtype = (torch.float16, torch.float32)[(i + j) % 2]
    arch = (POINTERS, DESCRIPTORS)[(i // 2 + j) % 2]
    blocks = ((0, 128, 0), (0, 0, 64), (0, 50, 0), (0, 64, 128))[(i + 2 * j) % 4]
    interpreter(product_case, (1, m, n, k), blocks, dtype, arch)


@pytest.mark.thin(2)
@pytest.mark.parametrize("axes", ((1,), (2,), (1, 2)), ids=("rows", "columns", "both"))
@pytest.mark.parametrize("block", (64, 128, 256, 50, 192, 1, 1000))
def test_blocks(interpreter, block, axes):
    blocks = tuple(block * (axis in axes) for axis in range(3))
    arch = DESCRIPTORS if sum(axes) % 2 else POINTERS
    interpreter(product_case, (1, 200, 264, 24), blocks, torch.float16, arch)


@pytest.mark.thin(2)
@pytest.mark.parametrize("arch", (POINTERS, DESCRIPTORS))
@pytest.mark.parametrize("blocks", ((1, 0, 0), (2, 0, 0), (1, 64, 0), (2, 16, 50), (0, 0, 0), (0, 64, 0)))
def test_batches(interpreter, blocks, arch):
    interpreter(product_case, (5, 72, 72, 40), blocks, torch.float16, arch)


@pytest.mark.thin(2)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("blocks", ((1, 0, 0), (0, 128, 0), (0, 0, 50), (1, 64, 64)))
def test_patterns(interpreter, blocks, pattern, dtype):
    arch = DESCRIPTORS if dtype == torch.float16 else POINTERS
    interpreter(product_case, (2, 136, 72, 40), blocks, dtype, arch, pattern, ("turned", "plain"), 2)


@pytest.mark.thin(3)
@pytest.mark.parametrize("layouts", itertools.product(LAYOUTS, LAYOUTS))
def test_layouts(interpreter, layouts):
    how = (2, 72, 72, 40), (0, 64, 0), torch.float16
    assert not interpreter(product_case, *how, POINTERS, "mixed", layouts, 2)
    if BOXES.issuperset(layouts):
        assert interpreter(product_case, *how, DESCRIPTORS, "mixed", layouts, 2)


def test_what_no_descriptor_describes_is_read_by_address(interpreter):
    for layouts in (("broadcast", "plain"), ("plain", "every other")):
        how = (2, 72, 72, 40), (0, 64, 0), torch.float16
        assert not interpreter(product_case, *how, DESCRIPTORS, "mixed", layouts)
    assert not interpreter(
        product_case, (1, 63, 72, 40), (0, 64, 0), torch.float16, DESCRIPTORS
    )  # strides of 126 bytes


@pytest.mark.parametrize("programs", (1, 7))
@pytest.mark.parametrize("blocks, dtype", (((0, 64, 0), torch.float32), ((1, 50, 64), torch.float16)))
def test_cut_tiles(interpreter, blocks, dtype, programs):
    """Long reductions, whose last tiles are cut, on GPUs of several sizes."""
    arch, k = (DESCRIPTORS, 520) if dtype == torch.float16 else (POINTERS, 264)
    interpreter(product_case, (2, 136, 136, k), blocks, dtype, arch, "mixed", ("turned", "plain"), programs)


@pytest.mark.parametrize("sizes", ((2, 8, 8, 0), (1, 0, 8, 8), (1, 8, 0, 8), (0, 8, 8, 8)))
def test_nothing_to_multiply(interpreter, sizes):
    for arch in (POINTERS, DESCRIPTORS):
        interpreter(product_case, sizes, (1, 3, 0), torch.float32, arch)


def far_case() -> None:
    """Strides as those of a slice of something very large."""
    from cacompile.kernels import masked_bmm_reference, triton_matmul

    with pretend(POINTERS):
        a, b = torch.randn(3, 7, 1).as_strided((3, 7, 1), (7, 1, 2**28)), torch.randn(3, 1, 5)
        flags, first_flags = make_flags((3, 7, 5), (0, 2, 0), "mixed")
        exact = masked_bmm_reference(a.double(), b.double(), flags, None, first_flags, (0, 2, 0))
        compare(triton_matmul.masked_matmul(a, b, flags, first_flags, (0, 2, 0)), exact)


def test_far_strides(interpreter):
    interpreter(far_case)
