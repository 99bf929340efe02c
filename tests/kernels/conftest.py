"""What every kernel test stands on: poisoned memory, masks, a comparison with float64."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from interpreter import interpreter_process
from masking import FIRST_FLAG, live_entries
from torch import Tensor

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
PATTERNS = ("on", "off", "one", "mixed")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for name, values in {"device": DEVICES, "pattern": PATTERNS}.items():
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that a tile nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    """Small products are faster without a second thread to wait for, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """cuDNN, unlike cuBLAS, takes TF32 for float32 unless told otherwise."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_flags(device: str) -> Callable[[str, int], Tensor]:
    """(pattern, number of blocks) -> flags with the blocks' own ones from FIRST_FLAG on, amid neighbours that lie."""

    def make(pattern: str, blocks: int) -> Tensor:
        own = {
            "on": [1] * blocks,
            "off": [0] * blocks,
            "one": [int(i == blocks - 1) for i in range(blocks)],  # the last block, which may be the smaller one
            "mixed": [int(i % 5 in (0, 2, 3)) for i in range(blocks)],
        }[pattern]
        lie = int(pattern == "off")
        return torch.tensor([lie] * FIRST_FLAG + own + [lie] * 2, dtype=torch.uint8, device=device)

    return make


@pytest.fixture
def check() -> Callable[..., None]:
    """(actual, exact result in float64, flags, first_flags, blocks): close where on, exactly zero where off."""

    def compare(
        actual: Tensor, exact: Tensor, flags: Tensor, first_flags: Sequence[int], blocks: Sequence[int]
    ) -> None:
        assert exact.dtype == torch.float64 and actual.shape == exact.shape
        live = live_entries(exact.shape, flags, first_flags, blocks)
        # sums of products of unit normals: errors grow with the size of the result, not element by element
        scale = float(exact.abs().max()) if exact.numel() else 1.0
        rounding = {torch.float64: 1e-13, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 1.6e-2}
        error = float((actual[live].double() - exact[live]).abs().max()) if live.any() else 0.0
        assert error <= rounding[actual.dtype] * max(scale, 1.0)  # NaN is not <= anything
        assert not actual[~live].any(), "an off block is not zero"

    return compare


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Callable[..., Any]]:
    """Runs a function of a test file in Triton's interpreter, where torch.empty gives NaN."""
    from interpreting import prepare  # which skips where there is no interpreter

    with interpreter_process(prepare) as run:
        yield run
