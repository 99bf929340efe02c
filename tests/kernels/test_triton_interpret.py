"""The Triton kernels, launched as on a GPU, by Triton's interpreter on the CPU.

It must be switched on before triton is imported and cannot be switched off again, so it lives in a process of its own.
bfloat16 is left to the GPU: the interpreter multiplies its bits as integers (triton 3.7).
"""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", exc_type=ImportError)
if version("triton").startswith("3.6") and int(version("numpy").split(".")[1]) >= 4:
    pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4", allow_module_level=True)

SLOT = 3
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
OPERANDS = (  # E, M, N, K, block: smaller than a tile; larger, and blocks that cut tiles; no tokens
    (3, 7, 5, 9, 2),
    (2, 63, 129, 33, 16),
    (1, 129, 63, 40, 50),
    (2, 8, 8, 0, 3),
)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[..., None]]:
    """Runs a function of this file where triton interprets; what it raises comes back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(os.getpid).result()  # started while the variable is set

            def run(function: Callable[..., None], *args: Any) -> None:
                pool.submit(function, *args).result()

            yield run


def mixed_flags(blocks: int) -> Tensor:
    """On, off, on, on, off, ... from SLOT on, between neighbours that lie."""
    return torch.tensor([0] * SLOT + [int(i % 5 in (0, 2, 3)) for i in range(blocks)] + [0], dtype=torch.uint8)


def compare(actual: Tensor, exact: Tensor) -> None:
    assert actual.shape == exact.shape
    if exact.numel():
        assert float((actual.double() - exact).abs().max()) <= TOLERANCE[actual.dtype] * max(
            1.0, float(exact.abs().max())
        )
        assert not actual[exact == 0].any()


def prepare() -> None:
    import triton

    assert triton.knobs.runtime.interpret
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN
    assert torch.empty(3).isnan().all()


def matmul_case(sizes: tuple[int, int, int, int, int], dtype: torch.dtype, axis: str, far: bool) -> None:
    prepare()
    from cacompile.kernels import masked_bmm_reference, triton_matmul

    e, m, n, k, block = sizes
    a, b = torch.randn(e, k, m).to(dtype).mT, torch.randn(e, n, k).to(dtype).mT
    if far:  # a stride as that of a slice of something very large
        a = a.as_strided((e, m, 1), (1, 1, 2**28))
        b = b[:, :1]
    flags = mixed_flags(max(e, m, n))
    dim = ("batch", "rows", "columns").index(axis)
    exact = masked_bmm_reference(a.double(), b.double(), flags, SLOT, block, dim)
    compare(triton_matmul.masked_matmul(a, b, flags, SLOT, block, axis), exact)


@pytest.mark.parametrize("axis", ("batch", "rows", "columns"))
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", OPERANDS)
def test_matmul(interpreter, sizes, dtype, axis):
    interpreter(matmul_case, sizes, dtype, axis, False)


def test_matmul_far_strides(interpreter):
    interpreter(matmul_case, OPERANDS[0], torch.float32, "rows", True)


def conv_case(dtype: torch.dtype, image: tuple[int, ...], kernel: tuple[int, ...], channels_last: bool) -> None:
    prepare()
    from cacompile.kernels import masked_conv_dw_reference, triton_conv

    n = len(image)
    conv = [2, 1][:n], [1, 2][:n], [1, 2][:n], False, [0] * n, 1
    weight, x = torch.randn(67, 5, *kernel).to(dtype), torch.randn(2, 5, *image).to(dtype)
    if channels_last:
        weight, x = (tensor.to(memory_format=torch.channels_last) for tensor in (weight, x))
    grad_out = torch.randn_like(torch.ops.aten.convolution.default(x, weight, None, *conv))
    flags = mixed_flags(5)
    out = torch.empty_like(weight)
    triton_conv.write_conv_dw(out, grad_out, x, flags, SLOT, 15, *conv[:3])
    operands = (tensor.double() for tensor in (grad_out, x, weight))
    compare(out, masked_conv_dw_reference(*operands, flags, SLOT, 15, 0, *conv))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "image, kernel, channels_last",
    (((9, 7), (3, 2), False), ((6, 8), (2, 4), True), ((5, 5), (1, 1), False), ((17,), (4,), False)),
)
def test_conv(interpreter, dtype, image, kernel, channels_last):
    interpreter(conv_case, dtype, image, kernel, channels_last)


def mismatch_case() -> None:
    prepare()
    from cacompile.kernels import triton_conv, triton_matmul

    flags = mixed_flags(8)
    with pytest.raises(ValueError, match="masked product"):
        triton_matmul.masked_matmul(torch.empty(1, 4, 5), torch.empty(1, 6, 4), flags, SLOT, 1, "rows")
    with pytest.raises(RuntimeError):  # not enough flags
        triton_matmul.masked_matmul(torch.empty(1, 40, 5), torch.empty(1, 5, 4), flags, SLOT, 1, "rows")
    out, grad_out, x = torch.empty(4, 3, 1, 1), torch.empty(2, 4, 5, 5), torch.empty(2, 6, 5, 5)
    with pytest.raises(ValueError, match="weight gradient"):
        triton_conv.write_conv_dw(out, grad_out, x, flags, SLOT, 1, [1, 1], [0, 0], [1, 1])


def test_mismatched_operands_are_refused_before_memory_is_touched(interpreter):
    interpreter(mismatch_case)
