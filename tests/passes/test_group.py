"""group: how the rows of a gradient are cut into blocks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from coupled import Case, Function
from tiny import Tiny, aten, located, reason
from torch import Tensor, fx

import cacompile
from cacompile.passes import group
from cacompile.passes.plan import Plan


def product(tiny: Tiny, rows: int, columns: int = 32) -> fx.Node:
    n = len(tiny.graph.nodes)
    return tiny.mm(tiny.input(f"a{n}", rows, 8), tiny.input(f"b{n}", 8, columns))


def cut(grad: fx.Node, block_rows: int) -> Plan:
    return group(located(grad), block_rows=block_rows)


def spans(plan: Plan) -> list[tuple[int, int]]:
    return [(s.start, s.stop) for g in plan.groups for s in g.slices]


def test_blocks_of_rows_the_last_one_smaller() -> None:
    plan = cut(product(Tiny(), 300), 128)
    assert [g.name for g in plan.groups] == ["w.rows[0:128]", "w.rows[128:256]", "w.rows[256:300]"]
    assert [g.flops for g in plan.groups] == [2 * rows * 8 * 32 for rows in (128, 128, 44)]
    assert [f.name for f in plan.families] == ["w.rows"] and not plan.families[0].semantic
    assert plan.grads[0].blocks == 3 and plan.grads[0].groups == (0, 1, 2)


def test_slots_run_through_all_parameters() -> None:
    tiny = Tiny()
    one, two = located(product(tiny, 64)), located(product(Tiny(), 32))
    [other] = two.grads
    plan = group(Plan(grads=(*one.grads, replace(other, param=replace(other.param, name="v")))), block_rows=16)
    assert [g.first_flag for g in plan.grads] == [0, 4] and len(plan.groups) == plan.blocks == 6


def test_sum_of_products_counts_both() -> None:
    tiny = Tiny()
    plan = cut(tiny.call(aten.add.Tensor, product(tiny, 64), product(tiny, 64)), 32)
    assert [g.flops for g in plan.groups] == [2 * 2 * 32 * 8 * 32] * 2


@pytest.mark.parametrize(("rows", "wanted", "block"), [((64, 32), 128, 64), ((64, 32), 16, 16), ((96, 48), 64, 48)])
def test_blocks_end_where_parts_meet(rows: tuple[int, int], wanted: int, block: int) -> None:
    tiny = Tiny()
    plan = cut(tiny.call(aten.cat.default, [product(tiny, r) for r in rows]), wanted)
    assert plan.grads[0].block == block
    assert spans(plan) == [(i, min(i + block, sum(rows))) for i in range(0, sum(rows), block)]


def test_parts_that_meet_at_odd_rows_stay_dense() -> None:
    tiny = Tiny()
    plan = cut(tiny.call(aten.cat.default, [product(tiny, 37), product(tiny, 43)]), 16)
    assert plan.groups == () and "meet at rows 37" in reason(plan)
    assert plan.dense[0].flops == 2 * 80 * 8 * 32


def steps_beside_entries(m: Any, x: Tensor) -> Tensor:
    """For each of 4 heads 16 entries and one step, made by one weight."""
    entries, steps = (x @ m.both).split((64, 4), -1)
    return (entries.unflatten(-1, (4, 16)) * steps[..., None]).flatten(-2) @ m.out


def test_units_of_few_rows_beside_many_are_rows_of_their_own() -> None:
    model = Function(Case(steps_beside_entries, {"both": (32, 68), "out": (64, 32)}, ""))
    found = cacompile.explain(model, torch.rand(2, 32), options={"block_rows": 16})
    groups = [(g.kind, [(s.param, s.dim, s.start, s.stop) for s in g.slices]) for g in found.groups]
    entries = [[("both", 1, 16 * i, 16 * i + 16), ("out", 0, 16 * i, 16 * i + 16)] for i in range(4)]
    assert groups == [*(("neurons", slices) for slices in entries), ("rows", [("both", 1, 64, 68)])]


def test_each_expert_is_a_block() -> None:
    tiny = Tiny()
    grad = tiny.call(aten.bmm.default, tiny.input("a", 3, 64, 8), tiny.input("b", 3, 8, 32))
    assert spans(cut(grad, 128)) == [(0, 1), (1, 2), (2, 3)]


def test_rows_of_several_entries_make_smaller_blocks() -> None:
    tiny = Tiny()
    grad = tiny.call(aten.reshape.default, product(tiny, 64), [8, 8, 32])
    assert spans(cut(grad, 32)) == [(0, 4), (4, 8)]
