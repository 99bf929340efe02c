"""What tests of products and convolutions in Triton's interpreter share.

bfloat16 is left to the GPU: the interpreter multiplies its bits as integers (triton 3.7).
"""

from collections.abc import Sequence
from contextlib import ExitStack
from unittest import mock

import torch
from interpreter import skip_without_interpreter
from torch import Tensor

skip_without_interpreter()

import triton  # noqa: E402

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}
POINTERS, DESCRIPTORS = "sm_80", "sm_90"  # how operands are read there
BOXES = {"plain", "turned", "sliced"}  # layouts that descriptors can describe
LAYOUTS = (*sorted(BOXES), "broadcast", "every other")
ODD = (1, 63, 129, 1000)
PATTERNS = {
    "on": lambda i, count: 1,
    "off": lambda i, count: 0,
    "one": lambda i, count: int(i == count - 1),  # the last block, which may be the smaller one
    "mixed": lambda i, count: int(i % 5 in (0, 2, 3)),
}


def prepare() -> None:
    assert triton.knobs.runtime.interpret
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # torch.empty gives NaN, so that what nobody wrote shows
    assert torch.empty(3).isnan().all()


def pretend(arch: str, programs: int = 4, precision: str = "ieee") -> ExitStack:
    """A GPU with so many multiprocessors; precision: of float32."""
    from cacompile.kernels import triton_conv, triton_matmul

    torch.manual_seed(0)
    as_there = {"architecture": lambda device: arch, "multiprocessors": lambda device: programs}
    stack = ExitStack()
    for module in (triton_matmul, triton_conv):  # without what they remember of other GPUs
        anew = {name: f.__wrapped__ for name, f in vars(module).items() if hasattr(f, "cache_info")}
        stack.enter_context(mock.patch.multiple(module, **(anew | as_there)))
    stack.callback(setattr, torch.backends.cuda.matmul, "fp32_precision", torch.backends.cuda.matmul.fp32_precision)
    torch.backends.cuda.matmul.fp32_precision = precision
    return stack


def make_flags(sizes: Sequence[int], blocks: Sequence[int], pattern: str) -> tuple[Tensor, list[int]]:
    """Flags and where those of each dimension start, between neighbours that lie."""
    lie = [int(pattern == "off")]
    flags, first_flags = lie * 3, []
    for size, block in zip(sizes, blocks):
        first_flags.append(len(flags) if block else 0)
        count = -(-size // block) if block else 0
        flags += [PATTERNS[pattern](i, count) for i in range(count)] + lie
    return torch.tensor(flags, dtype=torch.uint8), first_flags


def lay(kind: str, batch: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random [batch, rows, columns] as it may lie in memory."""
    if kind == "plain":
        return torch.randn(batch, rows, columns).to(dtype)
    if kind == "turned":
        return torch.randn(batch, columns, rows).to(dtype).mT
    if kind == "broadcast":
        return torch.randn(rows, columns).to(dtype).expand(batch, rows, columns)
    room = torch.full((batch + 2, rows + 16, 2 * columns + 16), torch.nan, dtype=dtype)
    step = 2 if kind == "every other" else 1
    part = room[1:-1, 8:-8, 8 : 8 + step * columns : step]
    return part.copy_(torch.randn(batch, rows, columns))


def compare(actual: Tensor, exact: Tensor, live: Tensor | None = None) -> None:
    """With a result in float64, or of one that is zero exactly where nothing is live."""
    assert actual.shape == exact.shape
    if exact.numel():
        scale = max(1.0, float(exact.abs().max()))
        assert float((actual.double() - exact).abs().max()) <= TOLERANCE[actual.dtype] * scale  # NaN is not <= anything
        assert not actual[exact == 0 if live is None else ~live].any()
