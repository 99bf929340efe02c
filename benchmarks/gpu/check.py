"""Every kernel against float64: dtypes, masks, odd sizes, layouts, poisoned memory, and inside a captured CUDA graph.

A case is a function with its arguments; it gives the largest relative error that it saw, or raises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.check_segments import fills, sums_of_groups
from benchmarks.gpu.operands import Flags, Operands, is_on
from benchmarks.gpu.shapes import Conv, Product, Shape, choices, masked_axes

TOLERANCE = {
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}
"""Of |result - exact| / |exact|, over the whole result."""

TF32 = 2e-3


class Case(NamedTuple):
    kernel: str
    case: str
    function: Callable[..., float]
    arguments: tuple[Any, ...]


ODD = (  # m, n, k, block
    (63, 129, 33, 16),
    (512, 384, 2056, 128),
    (129, 1000, 257, 50),
    (7, 5, 9, 2),
    (8, 24, 0, 3),
)
MASKED = (("rows",), ("columns",), ("rows", "columns"))
ODD_CONVS = (  # channels, filters, kernel, side, stride, images, block
    (5, 67, 3, 9, 2, 2, 15),
    (16, 96, 1, 7, 1, 3, 32),
    (64, 128, 3, 14, 1, 4, 64),
    (3, 64, 7, 32, 2, 2, 64),
)


def all_cases(device: str, shapes: tuple[Shape, ...]) -> Iterator[Case]:
    """The cases for a device, the most telling first; shapes: what will be timed. On a CPU a few small ones."""
    gpu = device == "cuda"
    for shape in shapes if gpu else ():
        yield Case("as timed", shape.case, as_timed, (shape, device))
    for shape in (
        Product("odd", 129, 260, 65, block=64),
        Product("odd", 130, 64, 32, batch=3),
        Conv("odd", 8, 64, 3, 8, batch=2, block=16),
    ):
        yield Case("captured", shape.case, captured, (shape, torch.float32, device))
    for dtype in (torch.bfloat16, torch.float32, torch.float16) if gpu else (torch.float32,):
        yield from _cases_of(dtype, device)
    if gpu:
        shape = Product("odd", 512, 384, 2056)
        yield Case("masked_mm", f"tf32 {shape.case}", masks, (shape, torch.float32, device, "plain", True))


def _cases_of(dtype: torch.dtype, device: str) -> Iterator[Case]:
    gpu, name = device == "cuda", str(dtype).removeprefix("torch.")
    for kernel, function in (("fill_estimates", fills), ("group_sums", sums_of_groups)):
        yield Case(kernel, name, function, (dtype, device))
    for channels, filters, kernel, side, stride, images, block in ODD_CONVS if gpu else ODD_CONVS[:1]:
        conv = Conv("odd", channels, filters, kernel, side, stride, images, block)
        yield Case("masked_conv_dw", f"{name} {conv.case}", masks, (conv, dtype, device))
    experts = [Product("odd", 63, 129, 33, masked, 3, 16) for masked in (("batch",), ("batch", "rows"), ("columns",))]
    sizes = ODD if gpu else ODD[:1]
    matrices = [Product("odd", *mnk, masked, block=block) for *mnk, block in sizes for masked in MASKED]
    for shape in (*experts[: 3 if gpu else 1], *matrices):
        op = "masked_bmm" if shape.batch > 1 else "masked_mm"
        yield Case(op, f"{name} {shape.case}", masks, (shape, dtype, device))
        if gpu and (shape.m, shape.n) in ((63, 129), (512, 384)):  # blocks that straddle tiles, and such that do not
            yield Case(op, f"{name} strided {shape.case}", masks, (shape, dtype, device, "strided"))


def prepare(tf32: bool = False) -> None:
    """NaN in all fresh memory, fresh random numbers, and float32 as it says, for the library too."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    assert bool(torch.empty(3).isnan().all())


def patterns(shape: Shape, device: str) -> Iterator[Flags]:
    """All on, all off, the last block alone, which may be a smaller one, and mixed."""
    totals = [count for _, count in masked_axes(shape).values()]
    yield Flags(shape, tuple(totals), 0, device)
    yield Flags(shape, tuple(0 for _ in totals), 0, device)
    last = Flags(shape, tuple(0 for _ in totals), 0, device)
    for dim, (_, total) in masked_axes(shape).items():
        last.host[last.first_flags[dim] + total - 1] = 1
    last.device.copy_(last.host)
    yield last
    for seed in (1, 2):
        yield Flags(shape, tuple(-(-total // 2) for total in totals), seed, device)


def distance(actual: Tensor, exact: Tensor, on: Tensor, allowed: float) -> float:
    """Relative error; raises above `allowed`, for NaN, and where a block that is off is not exactly zero."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, not {tuple(exact.shape)}"
    off = actual.masked_select(on.expand_as(exact) == 0)
    assert not bool(off.any()), f"{int(off.count_nonzero())} of {off.numel()} entries that are off are not zero"
    size = float(exact.double().norm())
    error = float((actual.double() - exact.double()).norm()) / (size or 1.0)
    assert error <= allowed, f"relative error {error:.2g}, allowed {allowed:.2g}"
    return error


def masks(shape: Shape, dtype: torch.dtype, device: str, layout: str = "plain", tf32: bool = False) -> float:
    """All patterns of flags, by the kernel and by the host's choice, on one set of operands."""
    prepare(tf32)
    operands = Operands(shape, dtype, device)
    if layout == "strided":  # slices of something larger: no dimension is contiguous
        operands.dy = torch.stack((operands.dy, operands.dy), -1).flatten(-2)[..., ::2]
        operands.x = torch.stack((operands.x, operands.x), -1).flatten(-2)[..., ::2]
    dense = operands.exact()
    worst = 0.0
    for flags in patterns(shape, device):
        on = is_on(dense, shape, flags)
        for result in (operands.tiles(flags), operands.masked(flags, host=device == "cuda")):
            worst = max(worst, distance(result, dense * on, on, TF32 if tf32 else TOLERANCE[dtype]))
    return worst


def captured(shape: Shape, dtype: torch.dtype, device: str) -> float:
    """One CUDA graph, replayed with other flags each time; where there is no GPU, called with them."""
    prepare()
    operands = Operands(shape, dtype, device)
    dense = operands.exact()
    flags, *others = patterns(shape, device)
    if device == "cuda":
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            operands.tiles(flags)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = operands.tiles(flags)
    worst = 0.0
    for other in (*others, flags):
        flags.device.copy_(other.host)
        if device == "cuda":
            graph.replay()
        else:
            out = operands.tiles(flags)
        on = is_on(dense, shape, flags)
        worst = max(worst, distance(out, dense * on, on, TOLERANCE[dtype]))
    return worst


def as_timed(shape: Shape, device: str) -> float:
    """The very kernel that will be timed, at its size, against the library in higher precision."""
    prepare()
    operands = Operands(shape, torch.bfloat16, device)
    dense = operands.exact(large=True)
    worst = 0.0
    for counts, share in choices(shape).items():
        if share in (0.0, 1.0) or 0.4 < share < 0.6:
            flags = Flags(shape, counts, 1, device)
            on = is_on(dense, shape, flags)
            worst = max(worst, distance(operands.tiles(flags), dense * on, on, TOLERANCE[torch.bfloat16]))
    return worst
