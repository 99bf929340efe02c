"""Of a parameter that is cut up among ranks each graph has a piece; layouts speak of the whole, on all alike."""

from __future__ import annotations

import pytest
from tiny import Tiny

from cacompile.layout import MaskLayout, Partition, Slice
from cacompile.passes.analyse import make_plan
from cacompile.passes.lower import lower
from cacompile.passes.plan import Param, Plan, Share

WIDTH = 24


def planned(rows: int, share: Share, block_rows: int = 16) -> Plan:
    """Of dw = mm(dy_t, x), a piece [rows, WIDTH] of a weight or [WIDTH, rows] of one that is cut along its columns."""
    tiny = Tiny()
    shape = (rows, WIDTH) if share.dim == 0 else (WIDTH, rows)
    w, dy_t, x = tiny.input("w", *shape), tiny.input("dy_t", shape[0], 8), tiny.input("x", 8, shape[1])
    dw = tiny.mm(dy_t, x)
    tiny.returns(dw)
    return make_plan((Param("w", 0, shape, w, dw, share=share),), block_rows=block_rows)


def of_all(layout: MaskLayout) -> list[tuple[str, tuple[Slice, ...]]]:
    """Each block's group, by name, in the order of the whole parameter."""
    (grad,) = layout.grads
    return [(layout.groups[number].name, layout.groups[number].slices) for number in grad.groups]


def test_all_ranks_know_the_groups_of_all():
    layouts = [lower(planned(64, Share(0, index, 3))) for index in range(3)]
    for index, layout in enumerate(layouts):
        (grad,) = layout.grads
        assert grad.partition == Partition(0, 16, 192) and grad.blocks == 12
        assert grad.window == (4 * index, 4 * index + 4) and grad.flags == slice(0, 4) and layout.blocks == 4
        assert len(grad.block_flops) == len(grad.coefficients[0]) == 12
        assert of_all(layout) == of_all(layouts[0])
        assert layout.flops == 2 * 8 * 64 * WIDTH  # what this rank computes
    assert of_all(layouts[0])[5] == ("w.rows[80:96]", (Slice("w", 0, 80, 96),))


def test_rows_of_which_each_rank_has_columns_are_everybodys():
    for index in range(2):
        (grad,) = lower(planned(64, Share(1, index, 2))).grads
        assert grad.partition.dim == 0 and grad.partition.rows == WIDTH
        assert grad.window is None and grad.flags == slice(0, grad.blocks)


@pytest.mark.parametrize(("rows", "block"), [(64, 16), (36, 12), (40, 10), (17, 17)])
def test_groups_end_where_a_piece_does(rows: int, block: int):
    plan = planned(rows, Share(0, 1, 2), block_rows=16 if rows > 17 else 32)
    (grad,) = lower(plan).grads
    assert grad.partition == Partition(0, block, 2 * rows)
    assert all(group.stop - group.start == block for group in plan.groups)


def test_pieces_whose_groups_would_be_too_thin_are_cut_along_their_columns():
    (grad,) = lower(planned(37, Share(0, 0, 2))).grads
    assert grad.partition == Partition(1, 16, WIDTH) and grad.window is None
