"""`cacompile::masked_grouped_mm`: the weight gradients of experts, without the experts, rows and columns that are off.

dw = _grouped_mm(dy_t, x, offs)  ->  dw = masked_grouped_mm(dy_t, x, offs, flags, host, first_flags, blocks)
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cacompile.torch_internals import grouped_mm

from .blocks import (
    KERNEL_DTYPES,
    Run,
    all_on,
    clear_gaps,
    fill,
    live_runs,
    readable,
    without_autocast,
    zero_off_blocks,
)
from .decide import Way, decide
from .dispatch import choose

ALWAYS = 2.0
"""Below which share the kernel is taken: no library product on a GPU leaves anything out."""

_LIBRARY = torch.library.Library("cacompile", "FRAGMENT")
# flexible_layout: as in masked_mm
_LIBRARY.define(
    "masked_grouped_mm(Tensor a, Tensor b, Tensor offs, Tensor flags, Tensor? host, int[] first_flags, int[] blocks)"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout),
)
masked_grouped_mm = torch.ops.cacompile.masked_grouped_mm.default


def masked_grouped_mm_reference(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    flags: Tensor,
    host: Tensor | None,
    first_flags: Sequence[int],
    blocks: Sequence[int],
) -> Tensor:
    """Each expert's `a @ b` over its own tokens, with experts, rows and columns set to exact zeros where off.

    a [M, S] and b [S, N] of one dtype and any strides. offs: 1-D int32 (or int64) on their device, of E experts;
    expert e has the tokens `offs[e - 1]` (0 for the first) up to, not including, `offs[e]`. Tokens from `offs[-1]` on
    belong to none; an expert without tokens gets zeros. flags, host: as for masked_mm; first_flags,
    blocks: of (experts, rows, columns). The result, [E, M, N], is contiguous; torch._grouped_mm's is as well
    unless N is no multiple of 16 bytes.

    On GPUs `offs` is never read by the host, unless in float64, or where all is on and the library itself reads it.
    """
    return zero_off_blocks(_by_expert(a, b, offs), flags, first_flags, blocks)


@torch.library.register_fake("cacompile::masked_grouped_mm", lib=_LIBRARY)
def _fake(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    flags: Tensor,
    host: Tensor | None,
    first_flags: Sequence[int],
    blocks: Sequence[int],
) -> Tensor:
    return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])


@without_autocast("cpu")
def _cpu(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    flags: Tensor,
    host: Tensor | None,
    first_flags: Sequence[int],
    blocks: Sequence[int],
) -> Tensor:
    sizes = _checked(a, b, offs)
    if all_on(flags, first_flags, blocks, sizes):
        return _dense(a, b, offs)
    experts, rows, columns = runs = _runs(flags, first_flags, blocks, sizes)
    if not all(runs) or 0 in sizes:
        return a.new_zeros(sizes)
    return _live(a, b, offs, experts, rows, columns)


@without_autocast("cuda")
def _cuda(
    a: Tensor,
    b: Tensor,
    offs: Tensor,
    flags: Tensor,
    host: Tensor | None,
    first_flags: Sequence[int],
    blocks: Sequence[int],
) -> Tensor:
    sizes, live = _checked(a, b, offs), None
    if host is not None and readable(host, a):
        runs = _runs(host, first_flags, blocks, sizes)
        live = 1.0 if all_on(host, first_flags, blocks, sizes) else 0.5 if all(runs) else 0.0
    way = decide(live, has_tiles=a.dtype in KERNEL_DTYPES, sliceable=False, tiles_below=ALWAYS)
    if way is Way.WHOLE:
        return _dense(a, b, offs)
    if way is Way.NOTHING:
        return a.new_zeros(sizes)
    if way is Way.EVERYTHING:
        return masked_grouped_mm_reference(a, b, offs, flags, host, first_flags, blocks)
    from .triton_grouped import masked_grouped_matmul  # here, because torch for CPUs comes without triton

    return masked_grouped_matmul(a, b, offs, flags, first_flags, blocks)


_LIBRARY.impl("masked_grouped_mm", _cpu, "CPU")
_LIBRARY.impl("masked_grouped_mm", _cuda, "CUDA")


def _checked(a: Tensor, b: Tensor, offs: Tensor) -> tuple[int, int, int]:
    """(E, M, N); torch._grouped_mm lets operands of unequal length pass."""
    if a.dtype != b.dtype or a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or offs.dim() != 1:
        shapes = f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}, offsets {tuple(offs.shape)}"
        raise ValueError(f"masked grouped product of {shapes}")
    return offs.shape[0], a.shape[0], b.shape[1]


def _runs(flags: Tensor, first_flags: Sequence[int], blocks: Sequence[int], sizes: Sequence[int]) -> list[list[Run]]:
    return [
        live_runs(flags, first_flag, block, size)
        for first_flag, block, size in zip(first_flags, blocks, sizes, strict=True)
    ]


def _dense(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    """What is left out of nothing: the library's own product, or where it has none, one for each expert.

    Bit for bit the operation that stood here, be it torch._grouped_mm or a loop over experts that fills a tensor laid
    out as this result is.
    """
    if not _library_takes(a, b, offs):
        return _by_expert(a, b, offs)
    return grouped_mm(a, b, offs.int()).contiguous()  # rows may come padded to 16 bytes


def _library_takes(a: Tensor, b: Tensor, offs: Tensor) -> bool:
    """What torch._grouped_mm asks of its operands, from torch 2.11 on; it raises an error otherwise."""
    if a.dtype not in KERNEL_DTYPES or 0 in (*a.shape, *b.shape, *offs.shape):
        return False
    if a.is_cuda and (offs.shape[0] >= 1024 or (a.data_ptr() | b.data_ptr()) % 16):
        return False
    return _has_whole_lines(a) and _has_whole_lines(b)


def _has_whole_lines(matrix: Tensor) -> bool:
    """Whether columns, or rows, are contiguous and a multiple of 16 bytes apart."""
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    if down == 1 and across >= rows:
        return across * matrix.itemsize % 16 == 0
    return across == 1 and down >= columns and down * matrix.itemsize % 16 == 0


def _tokens(offs: Tensor) -> list[Run]:
    """Each expert's, [start, stop)."""
    return list(pairwise([0, *offs.tolist()]))


@torch.no_grad()  # slices of the output are written in place
def _by_expert(a: Tensor, b: Tensor, offs: Tensor) -> Tensor:
    out = a.new_empty(_checked(a, b, offs))
    for part, (start, stop) in zip(out, _tokens(offs), strict=True):
        if start < stop:
            torch.mm(a[:, start:stop], b[start:stop], out=part)
        else:
            part.zero_()
    return out


@torch.no_grad()  # as above
def _live(
    a: Tensor, b: Tensor, offs: Tensor, experts: Sequence[Run], rows: Sequence[Run], columns: Sequence[Run]
) -> Tensor:
    """Each live expert's live rows and columns, straight into its slice of the output; zeros elsewhere."""
    e, m, n = sizes = _checked(a, b, offs)
    out = a.new_empty(sizes)
    long_run = choose(a.device, "mm", a.dtype, m, n, a.shape[1] // e).long_run
    clear_gaps(out, experts, 0)
    tokens, whole = _tokens(offs), (rows, columns) == ([(0, m)], [(0, n)])
    for expert in (i for lo, hi in experts for i in range(lo, hi)):
        part, (start, stop) = out[expert], tokens[expert]
        if start >= stop:
            part.zero_()
        elif whole:
            torch.mm(a[:, start:stop], b[start:stop], out=part)
        else:
            fill(part, torch.mm, a[:, start:stop], b[start:stop], rows, columns, long_run)
    return out
