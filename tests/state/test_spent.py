"""FLOPs of whole steps are counted once: what the policy weighs is what the session shows, also where less runs."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Block
from torch import nn

import cacompile
from cacompile.controller.weigh import step_flops
from cacompile.state.params import ParamState
from cacompile.state.registry import registry

OPTIONS = {"inner": "aot_eager", "block_rows": 16}


def train(model: nn.Module, steps: int) -> None:
    """With the backward that ends early, the lean forward or the forward alone, by what is frozen."""
    run = torch.compile(model, backend="convaware", options=OPTIONS)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(16, 32)
    for _ in range(steps):
        run(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def states_of(model: nn.Module) -> list[ParamState]:
    return [state for state in map(registry.find, model.parameters()) if state is not None]


@pytest.mark.parametrize("frozen", [(), ("0",), ("0", "1"), ("0", "1.up")])
def test_steps_of_the_policy_are_those_of_the_session(frozen: tuple[str, ...]) -> None:
    model = nn.Sequential(Block(), Block(), Block())
    session = cacompile.session(model)
    train(model, 1)
    for each in frozen:
        session.freeze(each)
    train(model, 4)
    states = states_of(model)
    assert sum(state.step_counted for state in states) == pytest.approx(session.step_flops, abs=100)
    for state in states:
        state.count()
    assert step_flops(states) == pytest.approx(session.step_flops / 5, abs=100)


@pytest.mark.parametrize("frozen", [["*"], ["0"]])
def test_parts_that_run_forward_only_cost_that(frozen: list[str]) -> None:
    """Each block is a graph of its own: one that is frozen, and all below it, runs forward alone."""
    model = nn.Sequential(*(torch.compile(Block(), backend="convaware", options=OPTIONS) for _ in range(2)))
    session = cacompile.session(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    x = torch.randn(16, 32)
    for step in range(4):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            session.freeze(*frozen)
    assert session.forward_flops > session.step_flops / 3
    assert sum(state.step_counted for state in states_of(model)) == pytest.approx(session.step_flops, abs=100)


def test_a_run_that_is_resumed_counts_alike() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block())
    session = cacompile.session(model)
    session.freeze("0")
    train(model, 3)
    other = copy.deepcopy(model)
    cacompile.session(other).load_state_dict(session.state_dict())
    train(model, 2)
    train(other, 2)
    assert [state.step_counted for state in states_of(other)] == [state.step_counted for state in states_of(model)]
