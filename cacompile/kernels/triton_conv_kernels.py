"""The Triton kernels of masked_conv_dw: the weight gradient of a convolution as one implicit matrix product a group.

dw[f, (i, j, c)] = sum over (n, h, w) of grad_out[n, f, h, w] * x[n, c, h * stride + i * dilation - padding, ...]

FILTERS and CHANNELS are those of one group; a pixel is an output's (n, h, w); a tap is one (i, j) of the kernel.
Names such as `grad_n` are strides in elements. Addresses are 64 bits wide up to an image and INDEX inside.
"""

import triton
import triton.language as tl

from .triton_tiles import entries_on, live_count, nth_live, split_rest

FIRST_FLAGS = ["first_flag"]  # no reason to compile again


@triton.jit
def live_filters(
    flags, FILTERS, lines, BLOCK: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr, LIST: tl.constexpr
):  # fmt: skip
    """`live_list` over the tiles of filters of all groups; a tile is of one group."""
    line = tl.arange(0, LIST)
    tiles = tl.cdiv(FILTERS, TILE)
    group, within = line // tiles, line % tiles * TILE
    first = (group * FILTERS + within) // BLOCK
    last = (group * FILTERS + tl.minimum(within + TILE, FILTERS) - 1) // BLOCK
    at = first[:, None] + tl.arange(0, SPAN)[None, :]
    inside = (line < lines)[:, None] & (at <= last[:, None])
    return tl.cumsum(tl.max((tl.load(flags + at, mask=inside, other=0) != 0).to(tl.int32), 1), 0)


@triton.jit
def columns_of(tile, CHANNELS, KERNEL_W, TAPS, ONE_TAP: tl.constexpr, BLOCK_N: tl.constexpr):
    """(tap row, tap column, channel, whether there is one) of a tile's columns; ONE_TAP: the tap is one for all."""
    if ONE_TAP:
        tiles = tl.cdiv(CHANNELS, BLOCK_N)
        channel = tile % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        tap = tile // tiles
        return tap // KERNEL_W, tap % KERNEL_W, channel, channel < CHANNELS
    else:  # noqa: RET505, the compiler wants both branches
        column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        tap = column // CHANNELS
        return tap // KERNEL_W, tap % KERNEL_W, column % CHANNELS, tap < TAPS


@triton.jit(do_not_specialize=FIRST_FLAGS)
def masked_conv_dw_kernel(
    out, grad_out, x, flags, parts,
    GROUPS, FILTERS, CHANNELS, PIXELS, first_flag,
    H, W, OUT_H, OUT_W, KERNEL_H, KERNEL_W,
    stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w,
    out_f, out_c, out_h, out_w,
    grad_n, grad_f, grad_h, grad_w,
    x_n, x_c, x_h, x_w,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, LIST: tl.constexpr, ONE_TAP: tl.constexpr,
    INPUT_PRECISION: tl.constexpr, INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """All of `out`: zeros where a filter's block is off. parts: of tiles that `add_conv_parts_kernel` adds up."""
    flags += first_flag
    TAPS = KERNEL_H * KERNEL_W
    tiles_m = tl.cdiv(FILTERS, BLOCK_M)
    tiles_n = TAPS * tl.cdiv(CHANNELS, BLOCK_N) if ONE_TAP else tl.cdiv(TAPS * CHANNELS, BLOCK_N)
    seen = live_filters(flags, FILTERS, GROUPS * tiles_m, BLOCK, SPAN, BLOCK_M, LIST)
    live = live_count(seen, 0, BLOCK_M, LIST) * tiles_n
    steps = tl.cdiv(PIXELS, BLOCK_K)
    whole, split_k = split_rest(live, tl.num_programs(0), steps)
    rest = tl.maximum(live - whole, 1)

    for unit in range(tl.program_id(0), whole + (live - whole) * split_k, tl.num_programs(0)):
        is_part = unit >= whole
        nth = tl.where(is_part, whole + (unit - whole) % rest, unit)
        part, of = tl.where(is_part, (unit - whole) // rest, 0), tl.where(is_part, split_k, 1)
        line = nth_live(seen, nth // tiles_n, LIST)
        group = line // tiles_m
        row = line % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        in_rows = row < FILTERS
        i, j, channel, in_columns = columns_of(nth % tiles_n, CHANNELS, KERNEL_W, TAPS, ONE_TAP, BLOCK_N)
        filters = (group * FILTERS + row).to(INDEX)
        channels = (group * CHANNELS + channel).to(INDEX)

        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(steps * part // of, steps * (part + 1) // of):
            pixel = step * BLOCK_K + tl.arange(0, BLOCK_K)
            in_pixels = pixel < PIXELS
            n = (pixel // (OUT_H * OUT_W)).to(tl.int64)
            h = pixel // OUT_W % OUT_H
            w = pixel % OUT_W
            at = n * grad_n + (h.to(INDEX) * grad_h + w.to(INDEX) * grad_w)
            g = tl.load(
                grad_out + (filters * grad_f)[:, None] + at[None, :],
                mask=in_rows[:, None] & in_pixels[None, :],
                other=0.0,
            )
            y, z = h * stride_h - padding_h, w * stride_w - padding_w
            if ONE_TAP:  # the address of a pixel does not depend on the column
                y, z = y + i * dilation_h, z + j * dilation_w
                there = in_pixels & (y >= 0) & (y < H) & (z >= 0) & (z < W)
                at = n * x_n + (y.to(INDEX) * x_h + z.to(INDEX) * x_w)
                v = tl.load(
                    x + at[:, None] + (channels * x_c)[None, :],
                    mask=there[:, None] & in_columns[None, :],
                    other=0.0,
                )
            else:
                y, z = y[:, None] + (i * dilation_h)[None, :], z[:, None] + (j * dilation_w)[None, :]
                there = in_pixels[:, None] & in_columns[None, :] & (y >= 0) & (y < H) & (z >= 0) & (z < W)
                at = (n * x_n)[:, None] + (channels * x_c)[None, :]
                v = tl.load(x + at + (y.to(INDEX) * x_h + z.to(INDEX) * x_w), mask=there, other=0.0)
            acc = tl.dot(g, v, acc, input_precision=INPUT_PRECISION)

        if is_part:
            m, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
            box = parts + (unit - whole).to(tl.int64) * (BLOCK_M * BLOCK_N)
            tl.store(box + m[:, None] * BLOCK_N + k[None, :], acc)
        else:
            on = entries_on(flags, group * FILTERS + row, (group + 1) * FILTERS, BLOCK, SPAN)
            acc = tl.where(on[:, None], acc, 0.0)
            at = (group * FILTERS + row).to(tl.int64)[:, None] * out_f
            at += (channel * out_c + i * out_h + j * out_w)[None, :]
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=in_rows[:, None] & in_columns[None, :])

    # always written: an off filter reads as zeros, never as what was in memory
    nothing = tl.zeros((BLOCK_M, BLOCK_N), out.dtype.element_ty)
    for tile in range(tl.program_id(0), GROUPS * tiles_m * tiles_n, tl.num_programs(0)):
        line = tile // tiles_n
        group, begin = line // tiles_m, line % tiles_m * BLOCK_M
        row = begin + tl.arange(0, BLOCK_M)
        last = (group * FILTERS + tl.minimum(begin + BLOCK_M, FILTERS) - 1) // BLOCK
        blocks = tl.minimum((group * FILTERS + begin) // BLOCK + tl.arange(0, SPAN), last)
        if tl.max((tl.load(flags + blocks) != 0).to(tl.int32), 0) == 0:
            i, j, channel, in_columns = columns_of(tile % tiles_n, CHANNELS, KERNEL_W, TAPS, ONE_TAP, BLOCK_N)
            at = (group * FILTERS + row).to(tl.int64)[:, None] * out_f
            at += (channel * out_c + i * out_h + j * out_w)[None, :]
            tl.store(out + at, nothing, mask=(row < FILTERS)[:, None] & in_columns[None, :])


@triton.jit(do_not_specialize=FIRST_FLAGS)
def add_conv_parts_kernel(
    out, flags, parts,
    GROUPS, FILTERS, CHANNELS, steps, programs, first_flag, KERNEL_H, KERNEL_W,
    out_f, out_c, out_h, out_w,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, LIST: tl.constexpr, ONE_TAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add up, in order, the parts of tiles that `programs` programs of `masked_conv_dw_kernel` have split.

    Program (t, c): rows c * ROWS .. of the t-th of those tiles, if there are so many.
    """
    flags += first_flag
    TAPS = KERNEL_H * KERNEL_W
    tiles_m = tl.cdiv(FILTERS, BLOCK_M)
    tiles_n = TAPS * tl.cdiv(CHANNELS, BLOCK_N) if ONE_TAP else tl.cdiv(TAPS * CHANNELS, BLOCK_N)
    seen = live_filters(flags, FILTERS, GROUPS * tiles_m, BLOCK, SPAN, BLOCK_M, LIST)
    live = live_count(seen, 0, BLOCK_M, LIST) * tiles_n
    whole, split_k = split_rest(live, programs, steps)
    mine = tl.program_id(0)
    if whole + mine < live:
        line = nth_live(seen, (whole + mine) // tiles_n, LIST)
        group = line // tiles_m
        within, k = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_N)
        row = line % tiles_m * BLOCK_M + within
        box = parts + mine.to(tl.int64) * (BLOCK_M * BLOCK_N) + within[:, None] * BLOCK_N + k[None, :]
        acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for _ in range(split_k):
            acc += tl.load(box)
            box += (live - whole).to(tl.int64) * (BLOCK_M * BLOCK_N)
        on = entries_on(flags, group * FILTERS + row, (group + 1) * FILTERS, BLOCK, SPAN)
        acc = tl.where(on[:, None], acc, 0.0)
        i, j, channel, in_columns = columns_of(
            (whole + mine) % tiles_n, CHANNELS, KERNEL_W, TAPS, ONE_TAP, BLOCK_N
        )  # fmt: skip
        at = (group * FILTERS + row).to(tl.int64)[:, None] * out_f
        at += (channel * out_c + i * out_h + j * out_w)[None, :]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=(row < FILTERS)[:, None] & in_columns[None, :])
