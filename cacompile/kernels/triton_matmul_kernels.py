"""The Triton kernels of masked_mm and masked_bmm; a matrix is a batch of one. `triton_matmul` launches them."""

import triton
import triton.language as tl

from .triton_tiles import entries_on, grouped, live_count, live_list, nth_live, split_rest, touches_live

FIRST_FLAGS = [
    "e_first_flag",
    "m_first_flag",
    "n_first_flag",
]  # no reason to compile again


@triton.jit(do_not_specialize=FIRST_FLAGS)
def masked_matmul_kernel(
    a, b, out, flags, parts,
    E, M, N, K, e_first_flag, m_first_flag, n_first_flag,
    stride_ae, stride_am, stride_ak, stride_be, stride_bk, stride_bn,
    E_BLOCK: tl.constexpr, M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr,
    M_SPAN: tl.constexpr, N_SPAN: tl.constexpr,
    E_LIST: tl.constexpr, M_LIST: tl.constexpr, N_LIST: tl.constexpr,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, TMA: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [E, M, N], contiguous: the product where flags are on, zeros elsewhere; see `masked_matmul`.

    parts: float32 [units of the last rounds, BLOCK_M, BLOCK_N], for `add_parts_kernel`.
    a is a pointer or, with TMA, a descriptor of [E, M, K] in boxes of a tile and a step; A_TURNED: of [E, K, M].
    """
    e_flags, m_flags, n_flags = flags + e_first_flag, flags + m_first_flag, flags + n_first_flag
    e_seen = live_list(e_flags, E, E_BLOCK, 1, 1, E_LIST)
    m_seen = live_list(m_flags, M, M_BLOCK, BLOCK_M, M_SPAN, M_LIST)
    n_seen = live_list(n_flags, N, N_BLOCK, BLOCK_N, N_SPAN, N_LIST)
    rows_live = live_count(m_seen, M, BLOCK_M, M_LIST)
    columns_live = live_count(n_seen, N, BLOCK_N, N_LIST)
    each = rows_live * columns_live
    live = live_count(e_seen, E, 1, E_LIST) * each
    steps = tl.cdiv(K, BLOCK_K)
    whole, split_k = split_rest(live, tl.num_programs(0), steps)
    rest = tl.maximum(live - whole, 1)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)

    # addresses are 64 bits wide up to the tile's corner and INDEX inside: operands may hold more than 2**31 elements
    i, j, ks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    i_wide, j_wide, k_wide = i.to(INDEX), j.to(INDEX), ks.to(INDEX)

    for unit in range(tl.program_id(0), whole + (live - whole) * split_k, tl.num_programs(0)):
        is_part = unit >= whole
        # all tiles' first parts, then all second ones: what runs at a time reads the same stretch of the operands
        nth = tl.where(is_part, whole + (unit - whole) % rest, unit)
        part, of = tl.where(is_part, (unit - whole) // rest, 0), tl.where(is_part, split_k, 1)
        e = nth_live(e_seen, nth // each, E_LIST)
        row, column = grouped(nth % each, rows_live, columns_live, 8)
        row, column = nth_live(m_seen, row, M_LIST), nth_live(n_seen, column, N_LIST)
        row0, col0 = row * BLOCK_M, column * BLOCK_N
        begin, end = steps * part // of, steps * (part + 1) // of

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if TMA:
            for step in tl.range(begin, end, warp_specialize=WARP_SPECIALIZE):
                k = step * BLOCK_K
                if A_TURNED:
                    x = a.load([e, k, row0]).reshape(BLOCK_K, BLOCK_M).T
                else:
                    x = a.load([e, row0, k]).reshape(BLOCK_M, BLOCK_K)
                if B_TURNED:
                    y = b.load([e, col0, k]).reshape(BLOCK_N, BLOCK_K).T
                else:
                    y = b.load([e, k, col0]).reshape(BLOCK_K, BLOCK_N)
                acc = tl.dot(x, y, acc, input_precision=INPUT_PRECISION)
        else:
            k0 = (begin * BLOCK_K).to(tl.int64)
            a_at = a + e.to(tl.int64) * stride_ae + row0.to(tl.int64) * stride_am + k0 * stride_ak
            b_at = b + e.to(tl.int64) * stride_be + col0.to(tl.int64) * stride_bn + k0 * stride_bk
            a_tile = i_wide[:, None] * stride_am + k_wide[None, :] * stride_ak
            b_tile = k_wide[:, None] * stride_bk + j_wide[None, :] * stride_bn
            a_inside, b_inside = (i < M - row0)[:, None], (j < N - col0)[None, :]
            for step in range(begin, end):
                k_inside = ks < K - step * BLOCK_K
                x = tl.load(a_at + a_tile, mask=a_inside & k_inside[None, :], other=0.0)
                y = tl.load(b_at + b_tile, mask=b_inside & k_inside[:, None], other=0.0)
                acc = tl.dot(x, y, acc, input_precision=INPUT_PRECISION)
                a_at += tl.cast(stride_ak, tl.int64) * BLOCK_K
                b_at += tl.cast(stride_bk, tl.int64) * BLOCK_K

        if is_part:
            box = parts + (unit - whole).to(tl.int64) * (BLOCK_M * BLOCK_N)
            tl.store(box + i[:, None] * BLOCK_N + j[None, :], acc)
        else:
            on = entries_on(m_flags, row0 + i, M, M_BLOCK, M_SPAN)[:, None]
            on = on & entries_on(n_flags, col0 + j, N, N_BLOCK, N_SPAN)[None, :]
            acc = tl.where(on, acc, 0.0)
            inside = (i < M - row0)[:, None] & (j < N - col0)[None, :]
            at = (e.to(tl.int64) * M + row0) * N + col0 + (i_wide[:, None] * N + j_wide[None, :])
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)

    # always written: an off tile reads as zeros, never as what was in memory
    if E_BLOCK + M_BLOCK + N_BLOCK > 0:
        nothing = tl.zeros((BLOCK_M, BLOCK_N), out.dtype.element_ty)
        for tile in range(tl.program_id(0), E * tiles_m * tiles_n, tl.num_programs(0)):
            e, row, column = tile // (tiles_m * tiles_n), tile // tiles_n % tiles_m, tile % tiles_n
            on = touches_live(e_flags, e, E, E_BLOCK, 1, 1 if E_BLOCK else 0)
            on = on & touches_live(m_flags, row, M, M_BLOCK, BLOCK_M, M_SPAN)
            on = on & touches_live(n_flags, column, N, N_BLOCK, BLOCK_N, N_SPAN)
            if not on:
                row0, col0 = row * BLOCK_M, column * BLOCK_N
                at = (e.to(tl.int64) * M + row0) * N + col0 + (i_wide[:, None] * N + j_wide[None, :])
                tl.store(out + at, nothing, mask=(i < M - row0)[:, None] & (j < N - col0)[None, :])


@triton.jit(do_not_specialize=FIRST_FLAGS)
def add_parts_kernel(
    out, flags, parts,
    E, M, N, steps, programs, e_first_flag, m_first_flag, n_first_flag,
    E_BLOCK: tl.constexpr, M_BLOCK: tl.constexpr, N_BLOCK: tl.constexpr,
    M_SPAN: tl.constexpr, N_SPAN: tl.constexpr,
    E_LIST: tl.constexpr, M_LIST: tl.constexpr, N_LIST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add up, in order, the parts of tiles that `programs` programs of `masked_matmul_kernel` have split.

    Program (t, c): rows c * ROWS .. of the t-th of those tiles, if there are so many.
    """
    e_flags, m_flags, n_flags = flags + e_first_flag, flags + m_first_flag, flags + n_first_flag
    e_seen = live_list(e_flags, E, E_BLOCK, 1, 1, E_LIST)
    m_seen = live_list(m_flags, M, M_BLOCK, BLOCK_M, M_SPAN, M_LIST)
    n_seen = live_list(n_flags, N, N_BLOCK, BLOCK_N, N_SPAN, N_LIST)
    rows_live = live_count(m_seen, M, BLOCK_M, M_LIST)
    columns_live = live_count(n_seen, N, BLOCK_N, N_LIST)
    each = rows_live * columns_live
    live = live_count(e_seen, E, 1, E_LIST) * each
    whole, split_k = split_rest(live, programs, steps)
    mine, chunk = tl.program_id(0), tl.program_id(1)
    if whole + mine < live:
        nth = whole + mine
        e = nth_live(e_seen, nth // each, E_LIST)
        row, column = grouped(nth % each, rows_live, columns_live, 8)
        row, column = nth_live(m_seen, row, M_LIST), nth_live(n_seen, column, N_LIST)
        i, j = chunk * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
        box = parts + mine.to(tl.int64) * (BLOCK_M * BLOCK_N) + i[:, None] * BLOCK_N + j[None, :]
        acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for _ in range(split_k):
            acc += tl.load(box)
            box += (live - whole).to(tl.int64) * (BLOCK_M * BLOCK_N)
        rows, columns = row * BLOCK_M + i, column * BLOCK_N + j
        on = entries_on(m_flags, rows, M, M_BLOCK, M_SPAN)[:, None]
        on = on & entries_on(n_flags, columns, N, N_BLOCK, N_SPAN)[None, :]
        acc = tl.where(on, acc, 0.0)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        at = e.to(tl.int64) * M * N + rows.to(tl.int64)[:, None] * N + columns[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=inside)
