"""The layout: all that training holds of a graph, without the graph."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Block, compile_all, train_step
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

import cacompile
from cacompile.layout import MaskLayout, Partition


@pytest.fixture(scope="module")
def layout() -> MaskLayout:
    """Of two tied linear layers, whose masked version was made."""
    torch._dynamo.reset()
    model = Block()
    train = model, compile_all(model, "convaware", options={"inner": "aot_eager", "block_rows": 16})
    train_step(train, [torch.randn(8, 32)])
    cacompile.session(model).pin(keep=0.5)
    train_step(train, [torch.randn(8, 32)])
    (binding,) = cacompile.session(model).bindings
    return binding.layout


def test_a_layout_is_pickled_whole(layout: MaskLayout):
    again = pickle.loads(pickle.dumps(layout))
    assert again == layout and again.blocks == layout.blocks > 1 and again.flops == layout.flops > 0
    assert layout.masked == {"up.weight", "down.weight"} and hash(again) == hash(layout)


def test_nothing_in_a_layout_leads_to_a_graph(layout: MaskLayout):
    met: set[int] = set()

    def walk(value: Any) -> None:
        assert not isinstance(value, (fx.Node, fx.Graph, torch.Tensor, torch.SymInt)), value
        if id(value) in met:
            return
        met.add(id(value))
        for slot in (*getattr(type(value), "__slots__", ()), *getattr(value, "__dict__", {})):
            walk(getattr(value, slot))
        if isinstance(value, (tuple, list, set, frozenset)):
            for each in value:
                walk(each)

    walk(layout)
    assert len(met) > 10


def test_flags_are_given_out_without_gaps(layout: MaskLayout):
    flags = np.concatenate([np.arange(grad.flags.start, grad.flags.stop) for grad in layout.grads])
    assert flags.tolist() == list(range(layout.blocks))
    for grad in layout.grads:
        assert len(grad.groups) == len(grad.block_flops) == grad.blocks and max(grad.groups) < len(layout.groups)


@given(rows=st.integers(1, 40), block=st.integers(1, 12), data=st.data())
def test_spans_are_the_rows_of_the_chosen_blocks(rows: int, block: int, data: st.DataObject):
    partition = Partition(0, block, rows)
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=partition.blocks, max_size=partition.blocks)), bool)
    covered = np.zeros(rows, bool)
    for start, length in partition.spans(chosen):
        assert length > 0 and not covered[start : start + length].any()
        covered[start : start + length] = True
    assert np.array_equal(covered, np.repeat(chosen, block)[:rows])
