"""`cacompile::masked_mm`: a matrix product which leaves out the rows and columns of blocks that are off this step.

dw = mm(dy_t, x)  ->  dw = masked_mm(dy_t, x, flags, host, first_flags, blocks)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import KERNEL_DTYPES, readable, without_autocast, zero_off_blocks
from .dispatch import by_library

_LIBRARY = torch.library.Library("cacompile", "FRAGMENT")
# flexible_layout: operands arrive as the permuted views they are, where Inductor would otherwise copy them
_LIBRARY.define(
    "masked_mm(Tensor a, Tensor b, Tensor flags, Tensor? host, int[] first_flags, int[] blocks) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
masked_mm = torch.ops.cacompile.masked_mm.default


def masked_mm_reference(
    a: Tensor, b: Tensor, flags: Tensor, host: Tensor | None, first_flags: Sequence[int], blocks: Sequence[int]
) -> Tensor:
    """`a @ b` with rows and columns set to exact zeros where their block is off.

    a [M, K] and b [K, N] of one dtype and any strides; flags: 1-D uint8 on their device. first_flags, blocks: of (rows,
    columns); row i belongs to `flags[first_flags[0] + i // blocks[0]]`; a block of 0: not masked along that dimension.
    host: the same flags in CPU memory, for operands that are not; None on CPUs, and where no host may decide.
    The result is contiguous. Sizes may be 0: no tokens (K = 0) give zeros.
    """
    return zero_off_blocks(torch.mm(a, b), flags, first_flags, blocks)


@torch.library.register_fake("cacompile::masked_mm", lib=_LIBRARY)
def _fake(
    a: Tensor, b: Tensor, flags: Tensor, host: Tensor | None, first_flags: Sequence[int], blocks: Sequence[int]
) -> Tensor:
    return torch.mm(a, b)


@without_autocast("cpu")
def _cpu(
    a: Tensor, b: Tensor, flags: Tensor, host: Tensor | None, first_flags: Sequence[int], blocks: Sequence[int]
) -> Tensor:
    return by_library(torch.mm, a, b, flags, first_flags, blocks)


@without_autocast("cuda")
def _cuda(
    a: Tensor, b: Tensor, flags: Tensor, host: Tensor | None, first_flags: Sequence[int], blocks: Sequence[int]
) -> Tensor:
    if readable(host, a):
        if (dw := by_library(torch.mm, a, b, host, first_flags, blocks)) is not None:
            return dw
    elif a.dtype not in KERNEL_DTYPES:
        return masked_mm_reference(a, b, flags, host, first_flags, blocks)
    else:
        host = None
    from .triton_matmul import masked_matmul  # here, because torch for CPUs comes without triton

    return masked_matmul(a.unsqueeze(0), b.unsqueeze(0), flags, (0, *first_flags), (0, *blocks), host).squeeze(0)


_LIBRARY.impl("masked_mm", _cpu, "CPU")
_LIBRARY.impl("masked_mm", _cuda, "CUDA")
