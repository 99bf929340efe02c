"""`cacompile::masked_mm_stats`, `masked_bmm_stats`: masked products with two sums over each block of the result.

dw = mm(dy_t, x)  ->  dw, sums = masked_mm_stats(dy_t, x, flags, host, slots, blocks, estimate)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .blocks import KERNEL_DTYPES, block_count, block_flags, readable, without_autocast, zero_off_blocks
from .dispatch import by_library

_LIBRARY = torch.library.Library("cacompile", "FRAGMENT")
for _name in ("masked_mm_stats", "masked_bmm_stats"):
    # flexible_layout: as in masked_mm
    _LIBRARY.define(
        f"{_name}(Tensor a, Tensor b, Tensor flags, Tensor? host, int[] slots, int[] blocks, Tensor? estimate)"
        " -> (Tensor, Tensor)",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
    )
masked_mm_stats = torch.ops.cacompile.masked_mm_stats.default
masked_bmm_stats = torch.ops.cacompile.masked_bmm_stats.default

Pair = tuple[Tensor, Tensor]


def masked_mm_stats_reference(
    a: Tensor, b: Tensor, flags: Tensor, host: Tensor | None, slots: Sequence[int], blocks: Sequence[int],
    estimate: Tensor | None,
) -> Pair:  # fmt: skip
    """What masked_mm gives, and float32 [2, row blocks, column blocks]; one block along a dimension that is not masked.

    [0] is the sum of squares of the gradient over each block, [1] its dot product with `estimate`, which has the
    result's shape: zeros where there is none. Blocks that are off give 0, whatever `estimate` holds there.
    """
    dw = zero_off_blocks(torch.mm(a, b), flags, slots, blocks)
    return dw, block_sums(dw, flags, slots, blocks, estimate)


def masked_bmm_stats_reference(
    a: Tensor, b: Tensor, flags: Tensor, host: Tensor | None, slots: Sequence[int], blocks: Sequence[int],
    estimate: Tensor | None,
) -> Pair:  # fmt: skip
    """What masked_bmm gives, and float32 [2, batch blocks, row blocks, column blocks], as masked_mm_stats_reference."""
    dw = zero_off_blocks(torch.bmm(a, b), flags, slots, blocks)
    return dw, block_sums(dw, flags, slots, blocks, estimate)


def block_sums(
    dw: Tensor, flags: Tensor, slots: Sequence[int], blocks: Sequence[int], estimate: Tensor | None
) -> Tensor:
    """Sums of dw * dw and of dw * estimate over each block, float32 [2, number of blocks along each dimension]."""
    counts = [block_count(block, size) for block, size in zip(blocks, dw.shape, strict=True)]
    sums = torch.zeros(2, *counts, dtype=torch.float32, device=dw.device)
    wide = dw.float()
    for total, other in zip(sums, (wide, estimate)):
        if other is not None and dw.numel():
            product = wide * other
            for dim, (block, size) in enumerate(zip(blocks, dw.shape, strict=True)):
                product = torch.cat([part.sum(dim, keepdim=True) for part in product.split(block or size, dim)], dim)
            total.copy_(product)
    for dim, (slot, block, size) in enumerate(zip(slots, blocks, dw.shape, strict=True)):
        if block:  # 0 * inf, where the estimate has gone astray, is not 0
            off = block_flags(flags, slot, block, size).eq(0)
            sums.masked_fill_(off.view(-1, *[1] * (dw.dim() - 1 - dim)), 0)
    return sums


def _implement(name: str, product: Callable[..., Tensor], reference: Callable[..., Pair]) -> None:
    def fake(
        a: Tensor, b: Tensor, flags: Tensor, host: Tensor | None, slots: Sequence[int], blocks: Sequence[int],
        estimate: Tensor | None,
    ) -> Pair:  # fmt: skip
        dw = product(a, b)
        counts = [block_count(block, size) for block, size in zip(blocks, dw.shape, strict=True)]
        return dw, dw.new_empty(2, *counts, dtype=torch.float32)

    @without_autocast("cpu")
    def cpu(
        a: Tensor, b: Tensor, flags: Tensor, host: Tensor | None, slots: Sequence[int], blocks: Sequence[int],
        estimate: Tensor | None,
    ) -> Pair:  # fmt: skip
        dw = by_library(product, a, b, flags, slots, blocks)
        return dw, block_sums(dw, flags, slots, blocks, estimate)

    @without_autocast("cuda")
    def cuda(
        a: Tensor, b: Tensor, flags: Tensor, host: Tensor | None, slots: Sequence[int], blocks: Sequence[int],
        estimate: Tensor | None,
    ) -> Pair:  # fmt: skip
        if readable(host, a):
            if (dw := by_library(product, a, b, host, slots, blocks)) is not None:
                return dw, block_sums(dw, flags, slots, blocks, estimate)
        elif a.dtype not in KERNEL_DTYPES:
            return reference(a, b, flags, host, slots, blocks, estimate)
        from .triton_matmul import masked_matmul_stats  # here, because torch for CPUs comes without triton

        if a.dim() == 3:
            dw, sums = masked_matmul_stats(a, b, flags, slots, blocks, estimate)
        else:
            like = None if estimate is None else estimate[None]
            dw, sums = masked_matmul_stats(a[None], b[None], flags, (0, *slots), (0, *blocks), like)
            dw, sums = dw.squeeze(0), None if sums is None else sums.squeeze(1)
        return dw, block_sums(dw, flags, slots, blocks, estimate) if sums is None else sums

    torch.library.register_fake(f"cacompile::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, cpu, "CPU")
    _LIBRARY.impl(name, cuda, "CUDA")


_implement("masked_mm_stats", torch.mm, masked_mm_stats_reference)
_implement("masked_bmm_stats", torch.bmm, masked_bmm_stats_reference)
