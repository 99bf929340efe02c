"""The Triton side of masked_embedding_dw: tokens whose rows are off are not even read.

Needs triton, which torch for CPUs comes without: imported at the first call with CUDA tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS, COLUMNS = 16, 256
"""One program's share: 16 bytes a thread and token in 16-bit dtypes, 32 in float32, with 4 warps."""


@triton.jit(do_not_specialize=["slot", "padding_idx"])
def scatter_rows_kernel(
    out, grad_out, indices, flags, T, D, slot, padding_idx, stride_t, stride_d,
    BLOCK: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out [rows, D], float32 zeros: add each token's gradient to its row, if that is on.

    Rows that several tokens share are summed by atomics, in no fixed order, as compiled embeddings do.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.load(indices + token, mask=token < T, other=0).to(tl.int64)
    on = (token < T) & (row != padding_idx)
    on = on & (tl.load(flags + slot + row // BLOCK, mask=on, other=0) != 0)
    if tl.max(on.to(tl.int32), 0) != 0:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        wanted = on[:, None] & (column < D)[None, :]
        at = token.to(tl.int64)[:, None] * stride_t + column[None, :] * stride_d
        value = tl.load(grad_out + at, mask=wanted, other=0.0).to(tl.float32)
        tl.atomic_add(out + row[:, None] * D + column[None, :], value, mask=wanted, sem="relaxed")


def scatter_rows(
    grad_out: Tensor, indices: Tensor, flags: Tensor, slot: int, block: int, rows: int, padding_idx: int
) -> Tensor:
    """[rows, D]: sums of `grad_out` [..., D] by `indices` [...] in float32, zeros in off blocks; no host sync."""
    if slot + triton.cdiv(rows, block) > flags.numel():
        raise IndexError(f"{flags.numel()} flags for {triton.cdiv(rows, block)} blocks from slot {slot} on")
    tokens = grad_out.reshape(indices.numel(), grad_out.shape[-1])
    (t, d), indices = tokens.shape, indices.contiguous()
    out = tokens.new_zeros(rows, d, dtype=torch.float32)
    if tokens.numel():
        with torch.cuda.device_of(tokens):
            scatter_rows_kernel[(triton.cdiv(t, TOKENS), triton.cdiv(d, COLUMNS))](
                out, tokens, indices, flags, t, d, slot, padding_idx, *tokens.stride(),
                BLOCK=block, TOKENS=TOKENS, COLUMNS=COLUMNS, num_warps=4,
            )  # fmt: skip
    return out.to(grad_out.dtype)
