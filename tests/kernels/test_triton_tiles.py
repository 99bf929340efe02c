"""Lists of live tiles, their order, and how the last round is cut; in Triton's interpreter."""

import itertools

import pytest
import torch
from interpreting import make_flags, triton

from cacompile.kernels.triton_tiles import (
    FEWEST_STEPS,
    grouped,
    list_length,
    live_count,
    live_list,
    live_tiles,
    most_split,
    nth_live,
    span,
    split_k_of,
    split_rest,
    touches_live,
)

tl = triton.language


@triton.jit
def cut_kernel(whole, parts, programs, steps, LIVES: tl.constexpr):
    live = tl.arange(0, LIVES)
    done, cut = split_rest(live, programs, steps)
    tl.store(whole + live, done)
    tl.store(parts + live, cut)


def cut_case(programs: int, steps: int) -> None:
    lives = 512
    whole, parts = (torch.empty(lives, dtype=torch.int32) for _ in range(2))
    cut_kernel[(1,)](whole, parts, programs, steps, lives)
    for live, (done, cut) in enumerate(zip(whole.tolist(), parts.tolist())):
        assert cut == split_k_of(live, programs, steps)
        assert done == (live if cut == 1 else live - live % programs)
        assert (live - done) * cut <= 2 * programs
        most, of = most_split(max(live, 1), programs, steps)
        assert live == done or (live - done <= most and (live - done) * cut <= most * of), "more parts than memory"
        ends = [steps * part // cut for part in range(cut + 1)]
        assert ends[0] == 0 and ends[-1] == steps and ends == sorted(ends)
        assert cut == 1 or min(hi - lo for lo, hi in itertools.pairwise(ends)) >= FEWEST_STEPS


@pytest.mark.parametrize("programs", (1, 2, 4, 108, 132, 264))
def test_the_last_round_is_cut_as_the_host_expects(interpreter, programs):
    for steps in (0, 1, 7, 8, 9, 64, 1000):
        interpreter(cut_case, programs, steps)


@triton.jit
def list_kernel(
    nth, count, touched, flags, size,
    BLOCK: tl.constexpr, TILE: tl.constexpr, SPAN: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    seen = live_list(flags, size, BLOCK, TILE, SPAN, LIST)
    tl.store(count, live_count(seen, size, TILE, LIST))
    tl.store(nth + i, nth_live(seen, i, LIST))
    tl.store(touched + i, touches_live(flags, i, size, BLOCK, TILE, SPAN).to(tl.int32))


def list_case(size: int, tile: int, block: int, pattern: str) -> None:
    flags, (first_flag,) = make_flags((size,), (block,), pattern)
    own, tiles = flags[first_flag:], -(-size // tile)
    entries = [bool(own[i // block]) if block else True for i in range(size)]
    live = [i for i in range(tiles) if any(entries[i * tile : (i + 1) * tile])]
    nth, touched = (torch.full((tiles,), -1, dtype=torch.int32) for _ in range(2))
    count = torch.full((1,), -1, dtype=torch.int32)
    shape = block, tile, span(tile, block), list_length(size, tile, block)
    list_kernel[(tiles,)](nth, count, touched, own, size, *shape)
    assert int(count) == len(live)
    if block:
        assert live_tiles(bytes(own[: -(-size // block)].tolist()), tile, block, size) == len(live)
    assert nth[: len(live)].tolist() == live
    assert touched.nonzero().flatten().tolist() == live


@pytest.mark.thin(3)
@pytest.mark.parametrize("tile", (1, 64, 128))
@pytest.mark.parametrize("block", (0, 1, 50, 64, 192, 256, 1000))
def test_lists_of_live_tiles(interpreter, block, tile, pattern):
    for size in (1, 63, 640) if tile > 1 else (1, 13):
        interpreter(list_case, size, tile, block, pattern)


@triton.jit
def grouped_kernel(row, column, rows, columns, COUNT: tl.constexpr):
    n = tl.arange(0, COUNT)
    i, j = grouped(n, rows, columns, 8)
    tl.store(row + n, i, mask=n < rows * columns)
    tl.store(column + n, j, mask=n < rows * columns)


def grouped_case() -> None:
    for rows, columns in ((1, 1), (8, 5), (9, 7), (3, 16), (25, 2)):
        row, column = (torch.full((rows * columns,), -1, dtype=torch.int32) for _ in range(2))
        grouped_kernel[(1,)](row, column, rows, columns, 64)
        every = itertools.product(range(rows), range(columns))
        assert sorted(zip(row.tolist(), column.tolist())) == list(every)


def test_every_tile_has_one_place_in_the_order(interpreter):
    interpreter(grouped_case)
