"""A model that has run is explained, whether or not anything of it can be skipped."""

from __future__ import annotations

import pytest
import torch
from helpers import Block
from torch import nn

import cacompile

OPTIONS = {"block_rows": 16, "inner": "aot_eager"}


class Summed(nn.Module):
    """A weight of which nothing can be skipped, as its gradient is no product but sums of one."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.w.cumsum(0))


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="convaware", options=OPTIONS)


def train(run: nn.Module, model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.SGD([param for param in model.parameters() if param.requires_grad], lr=0.1)
    for _ in range(steps):
        run(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()


def test_a_model_of_which_nothing_can_be_skipped_is_explained_as_with_inputs():
    model = Summed()
    with pytest.raises(cacompile.ConvAwareError, match="needs a model that has run forward"):
        cacompile.explain(model)
    train(compiled(model), model)
    found, expected = cacompile.explain(model), cacompile.explain(model, torch.randn(8, 32))
    assert found.rows == expected.rows and found.graphs == 1
    (row,) = found.rows
    assert row.reason and row.reason != "in no compiled graph that has run" and row.graph == 0
    assert found.code("joint") and found.code("forward")
    with pytest.raises(cacompile.ConvAwareError, match="none of its weight gradients can be skipped"):
        found.code("masked")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_dense_graph_beside_another_is_explained_too(order: tuple[int, int]):
    parts = (Block(), nn.Sequential(Summed(), nn.Linear(64, 32)))
    model = nn.Sequential(*[parts[i] for i in order])
    for part in (parts[0], parts[1][0]):  # each a graph of its own
        part.compile(backend="convaware", options=OPTIONS)
    train(model, model)
    found = {row.param: row for row in cacompile.explain(model).rows}
    linear, summed = f"{order.index(0)}.up.weight", f"{order.index(1)}.0.w"
    assert found[linear].operation == "masked_mm"
    assert found[summed].reason and found[summed].graph >= 0 and found[summed].graph != found[linear].graph
    assert found[f"{order.index(1)}.1.weight"].reason == "in no compiled graph that has run"


def test_blocks_that_share_a_dense_graph_are_all_explained():
    model = nn.ModuleList([Summed(), Summed()])
    for block in model:
        block.compile(backend="convaware", options=OPTIONS)
        block(torch.randn(8, 32)).sum().backward()
    rows = cacompile.explain(model).rows
    assert [row.param for row in rows] == ["0.w", "1.w"] and [row.graph for row in rows] == [0, 1]
    assert cacompile.explain(model[1]).rows[0].param == "w"


def test_a_frozen_model_trains_nothing():
    model = nn.Linear(32, 32).requires_grad_(False)
    run = compiled(model)
    run(torch.randn(8, 32))
    for found in (cacompile.explain(model), cacompile.explain(model, torch.randn(8, 32))):
        assert found.rows == () and "nothing is trained: no parameter requires a gradient" in str(found)


def test_what_is_frozen_after_training_is_not_listed_any_more():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    train(compiled(model), model)
    model.requires_grad_(False)
    assert "nothing is trained" in str(cacompile.explain(model))


def test_a_model_that_ran_without_gradients_only_says_so():
    model = nn.Linear(32, 32)
    run = compiled(model)
    with torch.no_grad():
        run(torch.randn(8, 32))
    with pytest.raises(cacompile.ConvAwareError, match=r"or under torch\.no_grad\(\)"):
        cacompile.explain(model)
    run(torch.randn(8, 32))
    assert cacompile.explain(model).rows[0].operation == "masked_mm"


def test_a_model_in_eval_mode_with_gradients_is_explained():
    model = nn.Sequential(nn.Linear(32, 32), nn.Dropout()).eval()
    compiled(model)(torch.randn(8, 32))
    assert cacompile.explain(model).rows[0].operation == "masked_mm"


def test_its_own_options_are_taken_where_nothing_can_be_skipped():
    model = Summed()
    train(compiled(model), model)
    model.up, model.down = nn.Linear(32, 256), nn.Linear(256, 32)
    model.forward = lambda x: model.down(torch.relu(model.up(x)))
    blocks = {row.param: row.blocks for row in cacompile.explain(model, torch.randn(8, 32)).rows}
    assert blocks["up.weight"] == blocks["down.weight"] == 256 // OPTIONS["block_rows"]


def test_graphs_of_other_models_are_left_out():
    model = Summed()
    run = compiled(model)
    run(torch.randn(8, 32)).sum().backward()
    assert len(cacompile.explain(model).rows) == 1
    other = Summed()
    with pytest.raises(cacompile.ConvAwareError, match="has run forward"):
        cacompile.explain(other)
