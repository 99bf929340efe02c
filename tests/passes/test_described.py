"""A whole step that was traced as torchtitan traces its own: one graph with parameters in, loss and gradients out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from cacompile import ConvAwareError, passes


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.register_buffer("flags", torch.ones(16, dtype=torch.uint8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x))).square().mean()


def traced(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, list[str], list[str]]:
    """(the graph of a step, what its first inputs are called, whose gradients are its last outputs)."""
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())

    def step(*inputs: Any) -> list[Tensor]:
        state = dict(zip([*params, *buffers], inputs))
        loss = functional_call(model, state, inputs[-1:])
        return [loss, *torch.autograd.grad(loss, [state[name] for name in params])]

    graph = make_fx(step, tracing_mode="fake")(*params.values(), *buffers.values(), x)
    return graph, [*params, *buffers], list(params)


def test_a_traced_step_skips_by_a_buffer():
    model, x = Model(), torch.randn(8, 32)
    graph, inputs, grads = traced(model, x)
    state = [*model.parameters(), *model.buffers(), x]
    dense = graph(*state)
    found = passes.describe(graph, inputs, grads)
    plans: list[Any] = []
    graph = passes.run_passes(graph, block_rows=16, flags=found["flags"], on_plan=plans.append)
    (plan,) = plans
    assert plan.masked == ("up.weight", "down.weight") and plan.groups[0].name == "up.neurons[0:16]"
    assert all(torch.equal(one, other) for one, other in zip(graph(*state), dense, strict=True))
    model.flags[: plan.blocks] = passes.flags_of(plan, {"up.neurons[0:16]": False})
    loss, up, bias, down, _ = graph(*state)
    assert torch.equal(loss, dense[0]) and torch.equal(bias, dense[2])
    assert not up[:16].any() and torch.equal(up[16:], dense[1][16:])
    assert not down[:, :16].any() and torch.equal(down[:, 16:], dense[3][:, 16:])


def test_names_that_do_not_fit_are_refused():
    graph, inputs, grads = traced(Model(), torch.randn(8, 32))
    with pytest.raises(ConvAwareError, match="at most the graph's 6, got 7 names"):
        passes.describe(graph, [*inputs, "more", "most"], grads)
    with pytest.raises(ConvAwareError, match=r"down\.weigth"):
        passes.describe(graph, inputs, ["down.weigth"])
