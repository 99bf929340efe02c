"""`cacompile::masked_embedding_dw`: the gradient of an embedding without the rows of blocks that are off this step.

dw = embedding_dense_backward(dy, indices, V, padding_idx, False)  ->  dw = masked_embedding_dw(dy, indices, flags, ...)
"""

import torch
from torch import Tensor

from .blocks import KERNEL_DTYPES, block_flags, read_flags, readable, zero_off_blocks

_LIBRARY = torch.library.Library("cacompile", "FRAGMENT")
# flexible_layout: as in masked_mm
_LIBRARY.define(
    "masked_embedding_dw(Tensor grad_out, Tensor indices, Tensor flags, Tensor? host, int slot, int block,"
    " SymInt rows, SymInt padding_idx) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
masked_embedding_dw = torch.ops.cacompile.masked_embedding_dw.default
_library = torch.ops.aten.embedding_dense_backward.default


def masked_embedding_dw_reference(
    grad_out: Tensor, indices: Tensor, flags: Tensor, host: Tensor | None, slot: int, block: int, rows: int,
    padding_idx: int,
) -> Tensor:  # fmt: skip
    """Row v of the result, [rows, D], is the sum of `grad_out` where `indices` is v; zeros where its block is off.

    grad_out [..., D] and indices [...], int32 or int64; nothing is added for `padding_idx` (-1: for none). Row v
    belongs to `flags[slot + v // block]`; flags and host as for masked_mm. The result is contiguous, of grad_out's
    dtype.
    """
    dw = _library(grad_out, indices, rows, padding_idx, False)
    return zero_off_blocks(dw, flags, (slot,), (block,))


@torch.library.register_fake("cacompile::masked_embedding_dw", lib=_LIBRARY)
def _fake(
    grad_out: Tensor, indices: Tensor, flags: Tensor, host: Tensor | None, slot: int, block: int, rows: int,
    padding_idx: int,
) -> Tensor:  # fmt: skip
    return grad_out.new_empty(rows, grad_out.shape[-1])


def _cpu(
    grad_out: Tensor, indices: Tensor, flags: Tensor, host: Tensor | None, slot: int, block: int, rows: int,
    padding_idx: int,
) -> Tensor:  # fmt: skip
    """The library on the tokens whose rows are on: what is skipped is never read."""
    on = read_flags(flags, slot, block, rows)
    if 0 in on:
        flat = indices.reshape(-1)
        live = block_flags(flags, slot, block, rows).index_select(0, flat // block).nonzero().view(-1)
        grad_out, indices = (
            grad_out.reshape(len(flat), grad_out.shape[-1]).index_select(0, live),
            flat.index_select(0, live),
        )
    return _library(grad_out, indices, rows, padding_idx, False)


def _cuda(
    grad_out: Tensor, indices: Tensor, flags: Tensor, host: Tensor | None, slot: int, block: int, rows: int,
    padding_idx: int,
) -> Tensor:  # fmt: skip
    on = read_flags(host, slot, block, rows) if host is not None and readable(host, grad_out) else None
    if on is not None and 0 not in on:
        return _library(grad_out, indices, rows, padding_idx, False)
    if on is not None and not any(on):
        return grad_out.new_zeros(rows, grad_out.shape[-1])
    if grad_out.dtype not in KERNEL_DTYPES or torch.are_deterministic_algorithms_enabled():
        return masked_embedding_dw_reference(grad_out, indices, flags, host, slot, block, rows, padding_idx)
    from .triton_embedding import scatter_rows  # here, because torch for CPUs comes without triton

    return scatter_rows(grad_out, indices, flags, slot, block, rows, padding_idx)


_LIBRARY.impl("masked_embedding_dw", _cpu, "CPU")
_LIBRARY.impl("masked_embedding_dw", _cuda, "CUDA")
