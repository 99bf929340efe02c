"""explain and status, on models that have run and on models that have not."""

import gc
from dataclasses import replace

import pytest
import torch
from helpers import Block
from torch import nn

import cacompile
from cacompile.explanation.look import CAN_ISOLATE

OPTIONS = {"block_rows": 16, "inner": "aot_eager"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 32)
        self.norm = nn.BatchNorm1d(32)
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, tokens):
        return self.down(torch.relu(self.up(self.norm(self.embed(tokens)))))


class Broken(nn.Module):
    """Its graph breaks in a frame below the outermost, so Dynamo compiles that one's code object by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x):
        hidden = self.up(x)
        torch._dynamo.graph_break()
        return self.down(torch.relu(hidden))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = Broken(), Broken(), nn.Linear(32, 32)

    def forward(self, x):
        return self.last(self.second(self.first(x)))


def stack(*blocks: nn.Module) -> nn.Sequential:
    """Blocks compiled one by one, that have run."""
    model = nn.Sequential(*blocks)
    for block in model:
        block.compile(backend="convaware", options=OPTIONS)
    model(torch.randn(8, 32)).sum().backward()
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, 10, (8,))


def test_explain_names_every_parameter_and_says_why_not(tokens):
    model = Net()
    found = cacompile.explain(model, tokens, options=OPTIONS)
    rows = {row.param: row for row in found.rows}
    assert set(rows) == {name for name, _ in model.named_parameters()}
    assert [(r.operation, r.blocks, r.block, r.along) for r in (rows["up.weight"], rows["down.weight"])] == [
        ("masked_mm", 4, 16, "rows"),
        ("masked_mm", 4, 16, "columns"),
    ]
    assert rows["up.weight"].families == rows["up.bias"].families == rows["down.weight"].families == ("up.neurons",)
    assert [(g.name, g.share) for g in found.groups if g.flops] == [
        (f"up.neurons[{i}:{i + 16}]", pytest.approx(0.25)) for i in range(0, 64, 16)
    ]
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
    assert cacompile.session(model).bindings == []


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
    assert [(r.param, r.operation, r.blocks) for r in traced.rows] == [
        (r.param, r.operation, r.blocks) for r in found.rows
    ]
    assert cacompile.session(model).groups == [group.name for group in found.groups if group.flops]


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
    assert (dense.groups, dense.skipped, dense.skipped_dw, dense.saved_flops) == (4, 0, 0.0, 0.0)
    assert dense.dw_flops == 2 * (2 * 64 * 32 * 8)
    cacompile.session(model).pin({"up.weight": False})
    compiled(tokens).sum().backward()
    half = cacompile.status(model)
    assert (half.skipped, half.skipped_dw) == (4, pytest.approx(0.5))
    assert half.saved_flops == pytest.approx(half.dw_flops / 4)
    assert {family.name: family.skipped for family in half.families} == {"up.neurons": 4}
    assert "4 of 4 groups skipped" in str(half)


@pytest.mark.parametrize(
    "ran", [False, pytest.param(True, marks=pytest.mark.skipif(not CAN_ISOLATE, reason="needs a newer torch"))]
)
def test_explain_again_and_again_is_the_same_and_uses_up_no_recompilations(ran):
    model, x = Twice(), torch.randn(8, 32)
    call = torch.compile(model, backend="convaware", options=OPTIONS)
    if ran:
        call(x)
    with torch._dynamo.config.patch(recompile_limit=2):
        found = [cacompile.explain(model, x, options=OPTIONS).to_dict() for _ in range(4)]
    assert all(one == found[0] for one in found)
    assert {row["param"] for row in found[0]["rows"]} == {name for name, _ in model.named_parameters()}
    if not ran:
        assert not torch._C._dynamo.eval_frame._debug_get_cache_entry_list(Broken.forward.__code__)
    # what was compiled still is, and for another size Dynamo may compile again
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    call(x)
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs) == ran
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    call(torch.randn(12, 32))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs


@pytest.mark.parametrize("early", [False, True])
def test_explain_names_the_parameters_of_identical_blocks(early):
    model = nn.Sequential(Block(), Block(), Block())
    if early:
        _ = cacompile.session(model).params
    model = stack(*model)
    found = cacompile.explain(model)
    assert [row.param for row in found.rows] == [
        f"{i}.{name}" for i in range(3) for name in ("up.weight", "up.bias", "down.weight", "down.bias")
    ]
    assert found.graphs == 3
    assert found.coverage == pytest.approx(1.0)
    alone = cacompile.explain(model[1])
    assert [row.param for row in alone.rows] == ["up.weight", "up.bias", "down.weight", "down.bias"]


def test_explain_shows_the_newest_of_several_graphs_over_the_same_parameters():
    model = stack(Block(), Block())
    model(torch.randn(12, 32))
    assert len(cacompile.session(model).bindings) == 4
    found = cacompile.explain(model)
    assert [row.param for row in found.rows] == [name for name, _ in model.named_parameters()]
    assert found.rows[0].flops == 2 * 64 * 32 * 12


def test_status_of_blocks_compiled_one_by_one():
    model = stack(Block(), Block(), Block())
    cacompile.session(model).pin(keep=0.0)
    found = cacompile.status(model)
    assert (found.skipped, found.skipped_dw) == (12, pytest.approx(1.0))
    cacompile.session(model).pin({"1.up.weight": False})
    assert cacompile.status(model).skipped_dw == pytest.approx(1 / 6)


@pytest.mark.parametrize(("masked", "skipped"), [(None, 1.0), (("up.weight",), 0.5), ((), 0.0)])
def test_status_counts_what_is_really_left_out(masked, skipped):
    """Of a graph whose masked version was not made for all that was planned."""
    [block] = stack(Block())
    session = cacompile.session(block)
    for binding in session.bindings:
        binding.layout = replace(binding.layout, masked=None if masked is None else frozenset(masked))
    session.pin(keep=0.0)
    found = cacompile.status(block)
    assert (found.skipped, found.skipped_dw) == (4 if skipped else 0, pytest.approx(skipped))
    assert not session.mask.any()


def test_status_of_a_graph_that_cuts_a_parameter_otherwise():
    """The first to run decides; the other one computes all, and when it is the only one left nothing is skipped."""
    model, x = Block(), torch.randn(8, 32)
    first = torch.compile(model, backend="convaware", options=OPTIONS)
    first(x)
    cacompile.session(model).pin(keep=0.0)
    assert cacompile.status(model).skipped == 4
    other = torch.compile(model, backend="convaware", options={**OPTIONS, "block_rows": 32})
    del first
    torch._dynamo.reset()
    other(x).sum().backward()
    gc.collect()
    assert model.up.weight.grad.any() and model.down.weight.grad.any()
    assert cacompile.status(model).skipped == 0
