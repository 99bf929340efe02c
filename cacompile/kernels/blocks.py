"""Blocks of a dimension: which of them are on, and work done on those alone.

A dimension of `size` rows (or columns, channels, experts) is cut into ceil(size / block) blocks, the last one smaller
where it must be; block i is on when `flags[first_flag + i] != 0`. A block of 0 means that this dimension is not masked.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cacompile.torch_internals import DisableAutocast, is_profiling

from .ranges import range_of

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the Triton kernels take; on a GPU everything else goes through the library."""

Run = tuple[int, int]
"""[start, stop) of one stretch of neighbouring live blocks, in rows, not blocks."""


def without_autocast(device: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Products in the operands' own dtype, as Inductor's are, when a backward runs under autocast; 0.2 us otherwise.

    While a profiler runs they also get a range with their parameter's name.
    """

    def wrap(implementation: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(implementation)
        def run(*args: object) -> Tensor:
            autocast = torch.is_autocast_enabled(device)
            if not (autocast or is_profiling()):
                return implementation(*args)
            with range_of(args), DisableAutocast() if autocast else contextlib.nullcontext():
                return implementation(*args)

        return run

    return wrap


def readable(host: Tensor | None, operand: Tensor) -> bool:
    """Whether the host may decide: it has flags, and no CUDA graph is being captured that would freeze what it says."""
    return host is not None and not (operand.is_cuda and torch.cuda.is_current_stream_capturing())


def block_flags(flags: Tensor, first_flag: int, block: int, size: int) -> Tensor:
    """The flags of one dimension, one per block: a view of `flags`, or an error where it is too short."""
    return flags.narrow(0, first_flag, -(-size // block))


def read_flags(flags: Tensor, first_flag: int, block: int, size: int) -> bytes:
    """The flags of one dimension from CPU memory, one byte per block: in a third of the time of narrow and tolist."""
    count = -(-size // block)
    read = flags.numpy()[first_flag : first_flag + count].tobytes()
    if len(read) != count:
        raise ValueError(f"{count} blocks from first_flag {first_flag} on, but {flags.numel()} flags")
    return read


def all_on(flags: Tensor, first_flags: Sequence[int], blocks: Sequence[int], sizes: Sequence[int]) -> bool:
    """Reads CPU flags, quickly: it is asked before every product."""
    for first_flag, block, size in zip(first_flags, blocks, sizes):
        if block and 0 in read_flags(flags, first_flag, block, size):
            return False
    return True


def live_runs(flags: Tensor, first_flag: int, block: int, size: int) -> list[Run]:
    """Reads CPU flags; everything on gives exactly `[(0, size)]`, everything off gives `[]`."""
    if not block:
        return [(0, size)]
    runs: list[Run] = []
    for i, flag in enumerate(read_flags(flags, first_flag, block, size)):
        if flag:
            start, stop = i * block, min(i * block + block, size)
            runs.append((runs.pop()[0] if runs and runs[-1][1] == start else start, stop))
    return runs


def length(runs: Sequence[Run]) -> int:
    """Rows of all runs together."""
    return sum(hi - lo for lo, hi in runs)


def zero_off_blocks(full: Tensor, flags: Tensor, first_flags: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """`full` with the off blocks of its first dimensions set to zero, in place: on any device, without a host sync."""
    for dim, (first_flag, block, size) in enumerate(zip(first_flags, blocks, full.shape)):
        if block:
            off = block_flags(flags, first_flag, block, size).eq(0).repeat_interleave(block)[:size]
            full = full.masked_fill_(off.view(-1, *[1] * (full.dim() - 1 - dim)), 0)
    return full


def clear_gaps(out: Tensor, runs: Sequence[Run], dim: int) -> None:
    """Write zeros wherever `runs` does not reach along `dim`."""
    stops, starts = [0, *(hi for _, hi in runs)], [*(lo for lo, _ in runs), out.shape[dim]]
    for lo, hi in zip(stops, starts, strict=True):
        if lo < hi:
            out.narrow(dim, lo, hi - lo).zero_()


def slices(tensor: Tensor, runs: Sequence[Run], dim: int) -> list[Tensor]:
    return [tensor.narrow(dim, lo, hi - lo) for lo, hi in runs]


def spread(packed: Tensor, out: Tensor, runs: Sequence[Run], dim: int) -> None:
    """Copy `packed`, which holds the runs side by side, to where they belong in `out`."""
    for part, chunk in zip(slices(out, runs, dim), packed.split([hi - lo for lo, hi in runs], dim), strict=True):
        part.copy_(chunk)


def pack(matrix: Tensor, runs: Sequence[Run], axis: int) -> Tensor:
    """Runs of a matrix side by side along `axis` (-2 or -1), in its own memory order: torch.cat alone transposes."""
    parts = slices(matrix, runs, axis)
    if len(parts) == 1:
        return parts[0]
    if matrix.stride(-2) < matrix.stride(-1):
        return torch.cat([part.mT for part in parts], -3 - axis).mT
    return torch.cat(parts, axis)


def bundles(runs: Sequence[Run], long_run: float) -> list[Sequence[Run]]:
    """What one call of the library computes: a run each where they are long on average, else all side by side."""
    return [[run] for run in runs] if length(runs) >= long_run * len(runs) else [runs]


@torch.no_grad()  # slices of the output are written in place
def multiply_runs(
    product: Callable[..., Tensor], a: Tensor, b: Tensor, runs: Sequence[Sequence[Run]], long_run: float
) -> Tensor:
    """`product(a, b)`, torch.mm or torch.bmm, where a run of each dimension of the result meets; zeros elsewhere.

    runs: of ([batch,] rows, columns). The multiplications done are those of the live entries and no more. Experts are
    never put side by side first: their products lie in slices of the output whatever their number.
    """
    out = a.new_empty(*a.shape[:-1], b.shape[-1])
    *batch, rows, columns = runs
    if not batch:
        fill(out, product, a, b, rows, columns, long_run)
        return out
    clear_gaps(out, batch[0], 0)
    for part, a_live, b_live in zip(*(slices(t, batch[0], 0) for t in (out, a, b)), strict=True):
        fill(part, product, a_live, b_live, rows, columns, long_run)
    return out


def fill(
    out: Tensor,
    product: Callable[..., Tensor],
    a: Tensor,
    b: Tensor,
    rows: Sequence[Run],
    columns: Sequence[Run],
    long_run: float,
) -> None:
    """Every bundle of rows with every bundle of columns, straight into its slice of the output where it is one run."""
    clear_gaps(out, rows, -2)
    right = [(bundle, pack(b, bundle, -1)) for bundle in bundles(columns, long_run)]
    for bundle in bundles(rows, long_run):
        alone = len(bundle) == 1
        left = pack(a, bundle, -2)
        wide = slices(out, bundle, -2)[0] if alone else out.new_empty(*left.shape[:-1], b.shape[-1])
        clear_gaps(wide, columns, -1)
        for narrow, piece in right:
            if len(narrow) == 1:
                product(left, piece, out=slices(wide, narrow, -1)[0])
            else:
                spread(product(left, piece), wide, narrow, -1)
        if not alone:
            spread(wide, out, bundle, -2)
