"""`cacompile::masked_bmm`: a batched matrix product which leaves out experts, rows and columns that are off this step.

dw = bmm(dy_t, x)  ->  dw = masked_bmm(dy_t, x, flags, host, first_flags, blocks)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import KERNEL_DTYPES, readable, without_autocast, zero_off_blocks
from .dispatch import by_library

_LIBRARY = torch.library.Library("cacompile", "FRAGMENT")
# flexible_layout: as in masked_mm
_LIBRARY.define(
    "masked_bmm(Tensor a, Tensor b, Tensor flags, Tensor? host, int[] first_flags, int[] blocks) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
masked_bmm = torch.ops.cacompile.masked_bmm.default


def masked_bmm_reference(
    a: Tensor, b: Tensor, flags: Tensor, host: Tensor | None, first_flags: Sequence[int], blocks: Sequence[int]
) -> Tensor:
    """`torch.bmm(a, b)` with batch entries, rows and columns set to exact zeros where their block is off.

    a [E, M, K] and b [E, K, N] of one dtype and any strides; flags, host: as for masked_mm. first_flags,
    blocks: of (batch, rows, columns). The result is contiguous. Sizes may be 0: no tokens (K = 0) give zeros.
    """
    return zero_off_blocks(torch.bmm(a, b), flags, first_flags, blocks)


@torch.library.register_fake("cacompile::masked_bmm", lib=_LIBRARY)
def _fake(
    a: Tensor, b: Tensor, flags: Tensor, host: Tensor | None, first_flags: Sequence[int], blocks: Sequence[int]
) -> Tensor:
    return torch.bmm(a, b)


@without_autocast("cpu")
def _cpu(
    a: Tensor, b: Tensor, flags: Tensor, host: Tensor | None, first_flags: Sequence[int], blocks: Sequence[int]
) -> Tensor:
    return by_library(torch.bmm, a, b, flags, first_flags, blocks)


@without_autocast("cuda")
def _cuda(
    a: Tensor, b: Tensor, flags: Tensor, host: Tensor | None, first_flags: Sequence[int], blocks: Sequence[int]
) -> Tensor:
    if readable(host, a):
        if (dw := by_library(torch.bmm, a, b, host, first_flags, blocks)) is not None:
            return dw
    elif a.dtype not in KERNEL_DTYPES:
        return masked_bmm_reference(a, b, flags, host, first_flags, blocks)
    else:
        host = None
    from .triton_matmul import masked_matmul  # here, because torch for CPUs comes without triton

    return masked_matmul(a, b, flags, first_flags, blocks, host)


_LIBRARY.impl("masked_bmm", _cpu, "CPU")
_LIBRARY.impl("masked_bmm", _cuda, "CUDA")
