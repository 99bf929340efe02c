"""`cacompile::masked_mm`: a matrix product which leaves out the rows, or columns, of blocks that are off this step.

dw = mm(dy_t, x)  ->  dw = masked_mm(dy_t, x, flags, slot, block, dim=0)
"""

import torch
from torch import Tensor

from .blocks import KERNEL_DTYPES, live_runs, multiply_runs, without_autocast, zero_off_blocks

_LIBRARY = torch.library.Library("cacompile", "FRAGMENT")
# flexible_layout: operands arrive as the permuted views they are, where Inductor would otherwise copy them
_LIBRARY.define(
    "masked_mm(Tensor a, Tensor b, Tensor flags, int slot, int block, int dim) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
masked_mm = torch.ops.cacompile.masked_mm.default


def masked_mm_reference(a: Tensor, b: Tensor, flags: Tensor, slot: int, block: int, dim: int) -> Tensor:
    """`a @ b` with rows (dim 0) or columns (dim 1) set to exact zeros where their block is off.

    a [M, K] and b [K, N] of one dtype and any strides; flags: 1-D uint8 on their device; row i belongs to
    `flags[slot + i // block]`. The result is contiguous. Sizes may be 0: no tokens (K = 0) give zeros.
    """
    return zero_off_blocks(torch.mm(a, b), flags, slot, block, dim)


@torch.library.register_fake("cacompile::masked_mm", lib=_LIBRARY)
def _fake(a: Tensor, b: Tensor, flags: Tensor, slot: int, block: int, dim: int) -> Tensor:
    return torch.mm(a, b)


@without_autocast
def _cpu(a: Tensor, b: Tensor, flags: Tensor, slot: int, block: int, dim: int) -> Tensor:
    size = a.shape[0] if dim == 0 else b.shape[1]
    runs = live_runs(flags, slot, block, size)
    if runs == [(0, size)]:
        return torch.mm(a, b)  # all on: bit for bit what this op stands in for
    return multiply_runs(torch.mm, a, b, runs, (-2, -1)[dim])


def _cuda(a: Tensor, b: Tensor, flags: Tensor, slot: int, block: int, dim: int) -> Tensor:
    if a.dtype not in KERNEL_DTYPES:
        return masked_mm_reference(a, b, flags, slot, block, dim)
    from .triton_matmul import masked_matmul  # here, because torch for CPUs comes without triton

    return masked_matmul(a.unsqueeze(0), b.unsqueeze(0), flags, slot, block, ("rows", "columns")[dim]).squeeze(0)


_LIBRARY.impl("masked_mm", _cpu, "CPU")
_LIBRARY.impl("masked_mm", _cuda, "CUDA")
