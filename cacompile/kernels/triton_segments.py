"""Sums over, and values for, blocks of many tensors in one launch. Tensors come as addresses in a segment table.

Needs triton, which torch for CPUs comes without: imported at the first use with CUDA tensors.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .segments import FIELDS, SegmentTable, Sent

VECTOR = 8
"""Elements that are addressed together: 16 bytes of 16-bit numbers, twice 16 of float32."""

SUM_WARPS, FILL_WARPS = 8, 16
PARTIALS = 256
"""Partial sums that are added at a time."""

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _chunk(chunks, FIELDS: tl.constexpr):
    """base, stride, first, run, length: this program's (see `segments._chunks`)."""
    at = chunks + tl.program_id(0).to(tl.int64) * FIELDS
    first, run, length = tl.load(at + 2), tl.load(at + 3), tl.load(at + 4)
    return tl.load(at), tl.load(at + 1), first.to(tl.int32), run.to(tl.int32), length.to(tl.int32)


@triton.jit
def _is_wide(addresses, base, stride, first, run, length, VECTOR: tl.constexpr):
    """Whether the chunk consists of whole vectors, each of them aligned. addresses: those of its tensors, or-ed."""
    return ((base | stride | first | run | length) % VECTOR == 0) & (addresses % 16 == 0)


@triton.jit
def _places(base, stride, first, run, length, WIDE: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr):
    """Distances from the tensor's start, and which of them belong to the chunk: [CHUNK / VECTOR, VECTOR] or 1 wide.

    WIDE addresses a vector at a time; the values, and so the order of a sum over them, are the same either way.
    What it divides and multiplies by VECTOR is divisible already: that tells the compiler so.
    """
    vectors = tl.arange(0, CHUNK // VECTOR)[:, None]
    lanes = tl.arange(0, VECTOR)[None, :]
    if WIDE:
        at = first // VECTOR + vectors
        runs = run // VECTOR
        whole = (at // runs).to(tl.int64) * (stride // VECTOR)
        places = (base // VECTOR + whole + at % runs) * VECTOR + lanes
        inside = vectors < length // VECTOR
    else:
        at = (first + vectors * VECTOR + lanes).to(tl.uint32)
        run = run.to(tl.uint32)
        places = base + (at // run).to(tl.int64) * stride + at % run
        inside = vectors * VECTOR + lanes < length
    return places, inside


@triton.jit
def _start(address, TYPE: tl.constexpr, WIDE: tl.constexpr):
    start = address.to(tl.pointer_type(TYPE))
    if WIDE:
        start = tl.multiple_of(start, 16)
    return start


@triton.jit
def _read(
    x, y, base, stride, first, run, length,
    X: tl.constexpr, Y: tl.constexpr, WIDE: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The chunk of the tensors at addresses x and y in float32; zeros outside, and for the address 0."""
    places, inside = _places(base, stride, first, run, length, WIDE, CHUNK, VECTOR)
    a = tl.load(_start(x, X, WIDE) + places, mask=inside & (places * 0 + x != 0), other=0.0)
    b = tl.load(_start(y, Y, WIDE) + places, mask=inside & (places * 0 + y != 0), other=0.0)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def chunk_sums_kernel(
    partials, chunks, pointers, factors,
    ADAM: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
    CHUNK: tl.constexpr, VECTOR: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """One program a chunk: its sum to `partials`. X, Y: types of the mean and, for ADAM, of the mean square."""
    base, stride, first, run, length = _chunk(chunks, FIELDS)
    segment = tl.load(chunks + tl.program_id(0).to(tl.int64) * FIELDS + 5)
    x = tl.load(pointers + segment * 3)
    y = tl.load(pointers + segment * 3 + 1)
    if _is_wide(x | y, base, stride, first, run, length, VECTOR):
        a, b = _read(x, y, base, stride, first, run, length, X, Y, True, CHUNK, VECTOR)
    else:
        a, b = _read(x, y, base, stride, first, run, length, X, Y, False, CHUNK, VECTOR)
    by_mean = tl.load(factors + segment * 3)
    if ADAM:
        by_square = tl.load(factors + segment * 3 + 1)
        step = tl.load(pointers + segment * 3 + 2)
        if step != 0:  # the optimizer counts on the device: the factors are log2 of its betas
            count = tl.load(step.to(tl.pointer_type(tl.float32)))
            by_mean = 1.0 / (1.0 - tl.exp2(count * by_mean))
            by_square = 1.0 / (1.0 - tl.exp2(count * by_square))
        mean = a * by_mean
        values = mean * mean / (tl.sqrt(b * by_square) + tl.load(factors + segment * 3 + 2))
        inside = tl.arange(0, CHUNK // VECTOR)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :] < length
        values = tl.where(inside, values, 0.0)  # 0 / 0 where eps is 0
    else:
        values = a * a * by_mean
    tl.store(partials + tl.program_id(0), tl.sum(tl.sum(values, 1), 0))


@triton.jit
def block_sums_kernel(sums, partials, first, PARTIALS: tl.constexpr):
    """One program a block: adds the partial sums of its chunks, always in the same order."""
    start = tl.load(first + tl.program_id(0))
    stop = tl.load(first + tl.program_id(0) + 1)
    acc = tl.zeros((PARTIALS,), tl.float32)
    for at in range(start, stop, PARTIALS):
        each = at + tl.arange(0, PARTIALS)
        acc += tl.load(partials + each, mask=each < stop, other=0.0)
    tl.store(sums + tl.program_id(0), tl.sum(acc, 0))


@triton.jit
def _write(
    grad, x, y, by_x, by_y, weight, base, stride, first, run, length,
    GRAD: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
    WIDE: tl.constexpr, CHUNK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    a, b = _read(x, y, base, stride, first, run, length, X, Y, WIDE, CHUNK, VECTOR)
    places, inside = _places(base, stride, first, run, length, WIDE, CHUNK, VECTOR)
    at = _start(grad, GRAD, WIDE) + places
    value = a * by_x + b * by_y
    if weight != 0.0:
        value += weight * (tl.load(at, mask=inside, other=0.0).to(tl.float32) - value)
    tl.store(at, value.to(GRAD), mask=inside)


@triton.jit
def fill_kernel(
    chunks, pointers, factors, weights,
    GRAD: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
    CHUNK: tl.constexpr, VECTOR: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """One program a chunk; those of blocks with weight 1 end at once."""
    at = chunks + tl.program_id(0).to(tl.int64) * FIELDS
    weight = tl.load(weights + tl.load(at + 6))
    if weight != 1.0:
        segment = tl.load(at + 5)
        base, stride, first, run, length = _chunk(chunks, FIELDS)
        grad = tl.load(pointers + segment * 4)
        x = tl.load(pointers + segment * 4 + 1)
        y = tl.load(pointers + segment * 4 + 2)
        scale = tl.load(pointers + segment * 4 + 3)
        by_x = tl.load(factors + segment * 2)
        by_y = tl.load(factors + segment * 2 + 1)
        if scale != 0:
            by = tl.load(scale.to(tl.pointer_type(tl.float32)))
            by_x *= by
            by_y *= by
        if _is_wide(grad | x | y, base, stride, first, run, length, VECTOR):
            _write(grad, x, y, by_x, by_y, weight, base, stride, first, run, length, GRAD, X, Y, True, CHUNK, VECTOR)
        else:
            _write(grad, x, y, by_x, by_y, weight, base, stride, first, run, length, GRAD, X, Y, False, CHUNK, VECTOR)


def group_sums(table: SegmentTable, sent: Sent, dtypes: Sequence[torch.dtype], adam: bool) -> Tensor:
    """Sum of the expected descent over each block of all segments: float32 [blocks], the same bits every time.

    adam: (by_mean * mean)^2 / (sqrt(by_square * square) + eps); pointers (mean, square, step), factors (by_mean,
    by_square, eps). Where `step`, float32, is on the device, the factors are log2(beta1), log2(beta2), eps, and
    by_mean is 1 / (1 - beta1^step). Otherwise: by_mean * mean^2; pointers (mean, 0, 0), factors (by_mean, 0, 0).
    dtypes: of mean and square.
    """
    sums = torch.empty(table.blocks, dtype=torch.float32, device=table.device)
    if table.blocks:
        partials = torch.empty(len(table.chunks), dtype=torch.float32, device=table.device)
        with torch.cuda.device_of(sums):
            chunk_sums_kernel[(len(partials),)](
                partials, table.chunks, sent.pointers, sent.factors,
                ADAM=adam, X=TYPES[dtypes[0]], Y=TYPES[dtypes[1]],
                CHUNK=table.chunk, VECTOR=VECTOR, FIELDS=FIELDS, num_warps=SUM_WARPS,
            )  # fmt: skip
            block_sums_kernel[(table.blocks,)](sums, partials, table.first, PARTIALS=PARTIALS, num_warps=SUM_WARPS)
    return sums


def fill_estimates(table: SegmentTable, sent: Sent, dtypes: Sequence[torch.dtype]) -> None:
    """grad = e + weight * (grad - e), e = scale * (by_x * x + by_y * y), each block of all segments with its weight.

    Weight 1: the block is not touched; 0: grad is not read. pointers (grad, x, y, scale), factors (by_x, by_y): x or y
    at address 0 counts as zeros, scale, one float32 on the device, as 1. dtypes: of grad, x and y; computed in float32.
    """
    if len(table.chunks):
        with torch.cuda.device_of(sent.pointers):
            fill_kernel[(len(table.chunks),)](
                table.chunks, sent.pointers, sent.factors, sent.weights,
                **{role: TYPES[dtype] for role, dtype in zip(("GRAD", "X", "Y"), dtypes, strict=True)},
                CHUNK=table.chunk, VECTOR=VECTOR, FIELDS=FIELDS, num_warps=FILL_WARPS,
            )  # fmt: skip
