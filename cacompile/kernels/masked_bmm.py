"""`cacompile::masked_bmm`: a batched matrix product which leaves out experts, rows or columns that are off this step.

dw = bmm(dy_t, x)  ->  dw = masked_bmm(dy_t, x, flags, slot, block=1, dim=0)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import KERNEL_DTYPES, Run, clear_gaps, live_runs, multiply_runs, slices, without_autocast, zero_off_blocks

_LIBRARY = torch.library.Library("cacompile", "FRAGMENT")
# flexible_layout: as in masked_mm
_LIBRARY.define(
    "masked_bmm(Tensor a, Tensor b, Tensor flags, int slot, int block, int dim) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
masked_bmm = torch.ops.cacompile.masked_bmm.default


def masked_bmm_reference(a: Tensor, b: Tensor, flags: Tensor, slot: int, block: int, dim: int) -> Tensor:
    """`torch.bmm(a, b)` with batch entries (dim 0), rows (1) or columns (2) set to exact zeros where a block is off.

    a [E, M, K] and b [E, K, N] of one dtype and any strides; flags: 1-D uint8 on their device; index i of `dim`
    belongs to `flags[slot + i // block]`. The result is contiguous. Sizes may be 0: no tokens (K = 0) give zeros.
    """
    return zero_off_blocks(torch.bmm(a, b), flags, slot, block, dim)


@torch.library.register_fake("cacompile::masked_bmm", lib=_LIBRARY)
def _fake(a: Tensor, b: Tensor, flags: Tensor, slot: int, block: int, dim: int) -> Tensor:
    return torch.bmm(a, b)


@without_autocast
def _cpu(a: Tensor, b: Tensor, flags: Tensor, slot: int, block: int, dim: int) -> Tensor:
    size = b.shape[2] if dim == 2 else a.shape[dim]
    runs = live_runs(flags, slot, block, size)
    if runs == [(0, size)]:
        return torch.bmm(a, b)  # all on: bit for bit what this op stands in for
    return multiply_runs(torch.bmm, a, b, runs, (-2, -1)[dim - 1]) if dim else _multiply_experts(a, b, runs)


@torch.no_grad()
def _multiply_experts(a: Tensor, b: Tensor, runs: Sequence[Run]) -> Tensor:
    """Each run straight into its slice of the output: nothing is gained by putting experts side by side first."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    clear_gaps(out, runs, 0)
    for part, a_live, b_live in zip(*(slices(t, runs, 0) for t in (out, a, b)), strict=True):
        torch.bmm(a_live, b_live, out=part)
    return out


def _cuda(a: Tensor, b: Tensor, flags: Tensor, slot: int, block: int, dim: int) -> Tensor:
    if a.dtype not in KERNEL_DTYPES:
        return masked_bmm_reference(a, b, flags, slot, block, dim)
    from .triton_matmul import masked_matmul  # here, because torch for CPUs comes without triton

    return masked_matmul(a, b, flags, slot, block, ("batch", "rows", "columns")[dim])


_LIBRARY.impl("masked_bmm", _cpu, "CPU")
_LIBRARY.impl("masked_bmm", _cuda, "CUDA")
