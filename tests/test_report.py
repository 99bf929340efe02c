"""explain and status, on models that have run and on models that have not."""

import pytest
import torch
from torch import nn

import cacompile

OPTIONS = {"block_rows": 16}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.norm = nn.BatchNorm1d(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, tokens):
        return self.down(torch.relu(self.up(self.norm(self.embed(tokens)))))


@pytest.fixture
def tokens():
    return torch.randint(0, 10, (8,))


def test_explain_names_every_parameter_and_says_why_not(tokens):
    model = Net()
    found = cacompile.explain(model, tokens, options=OPTIONS)
    rows = {row.param: row for row in found.rows}
    assert set(rows) == {name for name, _ in model.named_parameters()}
    assert (rows["up.weight"].operation, rows["up.weight"].groups, rows["up.weight"].block) == ("masked_mm", 4, 16)
    # dW of [64, 32] from 8 tokens: two FLOPs for each of 64 * 32 * 8 products
    assert rows["up.weight"].flops == 2 * 64 * 32 * 8
    assert rows["up.weight"].share == pytest.approx(0.5)
    assert all(bool(row.operation) != bool(row.reason) for row in found.rows)
    assert rows["embed.weight"].kind == "embedding"
    assert rows["up.bias"].kind == "vector"
    assert found.coverage == pytest.approx(1.0)
    assert found.to_dict()["rows"][0]["param"] == found.rows[0].param
    for name in rows:
        assert name in str(found)


def test_looking_leaves_no_trace(tokens):
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    cacompile.explain(model, tokens)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert cacompile.session(model).instances == []


def test_explain_of_a_model_that_has_run_needs_no_inputs(tokens):
    model = Net()
    with pytest.raises(ValueError, match="example inputs"):
        cacompile.explain(model)
    compiled = torch.compile(model, backend="convaware", options=OPTIONS)
    compiled(tokens).sum().backward()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = cacompile.explain(compiled)
    assert found.to_dict() == cacompile.explain(model).to_dict()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    traced = cacompile.explain(model, tokens)
    assert [(r.param, r.operation, r.groups) for r in traced.rows] == [
        (r.param, r.operation, r.groups) for r in found.rows
    ]


def test_explain_across_graph_breaks():
    class Broken(Net):
        def forward(self, tokens):
            hidden = self.up(self.norm(self.embed(tokens)))
            torch._dynamo.graph_break()
            return self.down(torch.relu(hidden))

    found = cacompile.explain(Broken(), torch.randint(0, 10, (8,)))
    assert found.graphs == 2
    assert {row.param for row in found.rows if row.operation} == {"up.weight", "down.weight"}


def test_status_counts_what_a_pinned_mask_skips(tokens):
    model = Net()
    compiled = torch.compile(model, backend="convaware", options=OPTIONS)
    compiled(tokens).sum().backward()
    dense = cacompile.status(compiled)
    assert (dense.groups, dense.skipped, dense.skipped_flops, dense.saved_flops) == (6, 0, 0.0, 0.0)
    assert dense.total_flops == 2 * (2 * 64 * 32 * 8)
    cacompile.session(model).pin({"up.weight": False})
    compiled(tokens).sum().backward()
    half = cacompile.status(model)
    assert (half.skipped, half.skipped_flops) == (4, pytest.approx(0.5))
    assert half.saved_flops == pytest.approx(half.total_flops / 4)
    assert {family.name: family.skipped for family in half.families} == {"up.weight": 4, "down.weight": 0}
    assert "4 of 6 groups skipped" in str(half)
    assert half.to_dict()["families"][0]["groups"] == 4
