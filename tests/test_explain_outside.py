"""explain of what coverage cannot count: weights in no compiled graph, and products inside other operations."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import cacompile
from cacompile.explanation.explain import Explanation


class Disabled(nn.Module):
    """A layer that torch.compile leaves alone, between two that it does not; and one that nothing runs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.eager, self.down = nn.Linear(32, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.unused = nn.Linear(4, 4)

    @torch.compiler.disable
    def middle(self, x: Tensor) -> Tensor:
        return self.eager(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.up(x)).relu())


class Recurrent(nn.Module):
    """Dynamo leaves LSTMs to eager mode, with all that is in the same frame."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(16, 32, batch_first=True), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


def trained(model: nn.Module, x: Tensor) -> nn.Module:
    torch._dynamo.reset()
    torch.compile(model, backend="convaware", options={"inner": "aot_eager"})(x).sum().backward()
    return model


def ways(model: nn.Module, x: Tensor) -> list[Explanation]:
    """After training, and with inputs."""
    return [cacompile.explain(trained(model, x)), cacompile.explain(model, x)]


def test_weights_outside_of_compiled_graphs_are_named_and_in_no_share() -> None:
    for found in ways(Disabled(), torch.randn(2, 32)):
        assert found.coverage == pytest.approx(1.0)  # of the graphs that there are
        assert found.outside.params == ("eager.weight", "eager.bias", "unused.weight", "unused.bias")
        assert found.outside.elements == 64 * 64 + 64 + 4 * 4 + 4
        rows = {row.param: row for row in found.rows}
        assert (rows["eager.weight"].share_text, rows["up.weight"].share_text) == ("?", "80.0%")
        last = str(found).splitlines()[-2:]
        assert "100.0% of the compiled graphs' dW FLOPs (counted)" in last[0]
        assert last[1] == (
            "outside of compiled graphs: 4 weights with 4,180 parameters (eager.weight, eager.bias, unused.weight, "
            "unused.bias); they run in eager mode, or have not run yet, and their share of dW FLOPs is not known"
        )
        written = json.loads(found.to_json())
        assert written["outside"] == {"params": list(found.outside.params), "elements": 4_180}
        assert "4 weights with 4,180 parameters" in found.to_html()


def test_a_model_of_which_nothing_is_compiled() -> None:
    model = Recurrent()
    for found in ways(model, torch.randn(2, 4, 16)):
        assert (found.graphs, found.coverage) == (0, 0.0)
        assert found.outside.params == tuple(name for name, _ in model.named_parameters())
        assert "outside of compiled graphs: 6 weights" in str(found)


def test_a_model_that_has_not_run_is_told_so() -> None:
    with pytest.raises(cacompile.ConvAwareError, match="needs a model that has run forward"):
        cacompile.explain(Recurrent())


def test_a_whole_model_says_nothing_of_an_outside() -> None:
    found = cacompile.explain(nn.Linear(16, 16), torch.randn(2, 16))
    assert (found.beyond, found.outside.params, found.uncounted.elements) == ([], (), 0)
    assert "100.0% of dW FLOPs (counted)" in str(found)


@torch.compiler.nested_compile_region
def region(block: nn.Module, x: Tensor) -> Tensor:
    return block(x)


class Regions(nn.Module):
    """Equal blocks, which are calls of one region from the second on."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + region(block, x)
        return x


def test_products_inside_regions_are_counted() -> None:
    for found in ways(Regions(), torch.randn(8, 32)):
        weights = [row for row in found.rows if len(row.shape) == 2]
        assert {row.flops for row in weights} == {2 * 8 * 32 * 64}
        assert {row.kind for row in weights} == {"linear"}
        inside = [row for row in weights if "invoke_subgraph" in row.reason]
        assert inside and found.coverage == pytest.approx(1 - len(inside) / 8)
        assert found.uncounted.params == ()


@torch.library.custom_op("outside::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight.t()


@linear.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("outside::linear_backward", mutates_args=())
def linear_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return dy @ weight, dy.t() @ x


@linear_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


linear.register_autograd(
    lambda ctx, dy: linear_backward(dy, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Custom(nn.Module):
    """A layer whose backward is an operation of somebody's own, or that and the plain product beside it."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.plain = plain
        self.own, self.down = nn.Linear(32, 64, bias=False), nn.Linear(64, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = linear(x, self.own.weight)
        return self.down((y + self.own(x) if self.plain else y).relu())


@pytest.mark.parametrize(("plain", "share"), [(False, "?"), (True, "at least 66.7%")])
def test_products_inside_operations_of_others_are_told_of(plain: bool, share: str) -> None:
    for found in ways(Custom(plain), torch.randn(8, 32)):
        assert found.uncounted.params == ("own.weight",) and found.uncounted.elements == 32 * 64
        assert next(row.share_text for row in found.rows if row.param == "own.weight") == share
        assert "not counted: at least 1 weight with 2,048 parameters (own.weight)" in str(found)
        assert json.loads(found.to_json())["uncounted"]["params"] == ["own.weight"]
