"""Where a masked result must be computed and where it must be zero."""

from collections.abc import Sequence

import torch
from torch import Tensor

FIRST_FLAG = 3  # where the flags of a test start, so that reading from 0 shows


def along(dims: int | Sequence[int], block: int, rank: int) -> tuple[list[int], list[int]]:
    """first_flags and blocks of a product masked along `dims`, flags from FIRST_FLAG on, shared by several dims."""
    chosen = [dims] if isinstance(dims, int) else dims
    return [FIRST_FLAG * (dim in chosen) for dim in range(rank)], [block * (dim in chosen) for dim in range(rank)]


def blocks_of(sizes: Sequence[int], dims: int | Sequence[int], block: int) -> int:
    """How many flags that takes."""
    chosen = [dims] if isinstance(dims, int) else dims
    return max(-(-sizes[dim] // block) for dim in chosen)


def live_entries(shape: Sequence[int], flags: Tensor, first_flags: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """bool of this shape: the entries whose block is on along each masked one of the first dimensions."""
    live = torch.ones(tuple(shape), dtype=torch.bool)
    each = flags.tolist()
    for dim, (first_flag, block) in enumerate(zip(first_flags, blocks)):
        if block:
            on = torch.tensor([bool(each[first_flag + i // block]) for i in range(shape[dim])], dtype=torch.bool)
            live &= on.view(-1, *[1] * (len(shape) - 1 - dim))
    return live.to(flags.device)
