"""Blocks of a dimension: which of them are on, and work done on those alone.

A dimension of `size` rows (or columns, channels, experts) is cut into ceil(size / block) blocks, the last one smaller
where it must be; block i is on when `flags[slot + i] != 0`.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the Triton kernels take; on a GPU everything else goes through the library and `zero_off_blocks`."""

Run = tuple[int, int]
"""[start, stop) of one stretch of neighbouring live blocks, in rows, not blocks."""

LONG_RUN = 256
"""Mean length from which every run gets a product of its own (see `multiply_runs`)."""


def without_autocast(implementation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Products in the operands' own dtype, as Inductor's are, when a backward runs under autocast; 0.2 us otherwise."""

    @functools.wraps(implementation)
    def run(*args: object) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return implementation(*args)
        with torch._C._DisableAutocast():
            return implementation(*args)

    return run


def block_flags(flags: Tensor, slot: int, block: int, size: int) -> Tensor:
    """The flags of one dimension, one per block: a view of `flags`, or an error where it is too short."""
    return flags.narrow(0, slot, -(-size // block))


def live_runs(flags: Tensor, slot: int, block: int, size: int) -> list[Run]:
    """Reads CPU flags; everything on gives exactly `[(0, size)]`, everything off gives `[]`."""
    on = block_flags(flags, slot, block, size).tolist()
    if 0 not in on:
        return [(0, size)]
    runs: list[Run] = []
    for i, flag in enumerate(on):
        if flag:
            start, stop = i * block, min(i * block + block, size)
            runs.append((runs.pop()[0] if runs and runs[-1][1] == start else start, stop))
    return runs


def zero_off_blocks(full: Tensor, flags: Tensor, slot: int, block: int, dim: int) -> Tensor:
    """`full` with its off blocks along `dim` set to zero, in place: on any device, without a host sync."""
    size = full.shape[dim]
    off = block_flags(flags, slot, block, size).eq(0).repeat_interleave(block)[:size]
    return full.masked_fill_(off.view(-1, *[1] * (full.dim() - 1 - dim)), 0)


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


def pack(parts: Sequence[Tensor], axis: int) -> Tensor:
    """Matrices side by side along `axis` (-2 or -1), in the memory order they come in: torch.cat alone transposes."""
    if parts[0].stride(-2) < parts[0].stride(-1):
        return torch.cat([part.mT for part in parts], -3 - axis).mT
    return torch.cat(list(parts), axis)


@torch.no_grad()  # slices of the output are written in place
def multiply_runs(product: Callable[..., Tensor], a: Tensor, b: Tensor, runs: Sequence[Run], axis: int) -> Tensor:
    """`product(a, b)`, torch.mm or torch.bmm, for `runs` of its rows (axis -2) or columns (axis -1); zeros elsewhere.

    CPU. Long runs are multiplied straight into their slice of the output; short ones are put side by side first. At
    half density and blocks of 128, either way takes 0.57 to 0.67 of the library's time; at blocks of 16 a product a run
    takes 0.75 to 1.05 and side by side 0.56 to 0.83 (512..2048 squared, K 512..4096, fp32 and bf16, 2 cores, medians of
    interleaved ratios; gathering rows by index instead takes up to 1.3).
    """
    out = a.new_empty(*a.shape[:-1], b.shape[-1])
    clear_gaps(out, runs, axis)
    live = slices(a if axis == -2 else b, runs, axis)
    if len(runs) <= 1 or sum(hi - lo for lo, hi in runs) >= LONG_RUN * len(runs):
        for part, piece in zip(slices(out, runs, axis), live, strict=True):
            product(*((piece, b) if axis == -2 else (a, piece)), out=part)
    else:
        packed = pack(live, axis)
        spread(product(*((packed, b) if axis == -2 else (a, packed))), out, runs, axis)
    return out
