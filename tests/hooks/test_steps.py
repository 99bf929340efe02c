"""Every optimizer step is followed, by whatever way the optimizer came to be, and no other optimizer is touched."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

import cacompile
from cacompile.hooks.steps import Controllers, controllers_of, make_controllers

OPTIONS = {"block_rows": 16, "warmup_steps": 0, "inner": "aot_eager"}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


def train(compiled: Any, *optimizers: optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        compiled(torch.randn(4, 16)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def steps_of(model: nn.Module) -> dict[str, int]:
    return {n: r.step for n, r in cacompile.session(model).params.items() if r.blocks}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("copied", [False, True])
def test_steps_are_seen_of_an_optimizer_made_before_or_after_compiling(when: str, copied: bool):
    model = net()
    if when == "before":
        optimizer = optim.AdamW(model.parameters())
        compiled = torch.compile(model, backend="convaware", options=OPTIONS)
    else:
        compiled = torch.compile(model, backend="convaware", options=OPTIONS)
        train(compiled)
        optimizer = optim.AdamW(compiled.parameters())
    if copied:
        optimizer = copy.copy(optimizer)
    train(compiled, optimizer, steps=3)
    assert steps_of(model) == {"0.weight": 3, "2.weight": 3}
    assert cacompile.session(compiled).step_count == 3


def test_two_optimizers_on_one_model_each_advance_their_own():
    model = net()
    compiled = torch.compile(model, backend="convaware", options=OPTIONS)
    first, second = optim.AdamW(model[0].parameters()), optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
    train(compiled, first, steps=2)
    train(compiled, first, second, steps=3)
    assert steps_of(model) == {"0.weight": 5, "2.weight": 3}


def test_two_models_under_one_optimizer_are_drawn_together():
    models = [net(), net()]
    compiled = [torch.compile(model, backend="convaware", options=OPTIONS) for model in models]
    optimizer = optim.AdamW([p for model in models for p in model.parameters()])
    for one in compiled:
        train(one)
    optimizer.step()
    assert [steps_of(model) for model in models] == [{"0.weight": 1, "2.weight": 1}] * 2
    (controller,) = controllers_of(optimizer)
    assert len(controller.params) == 4
    sessions = [cacompile.session(model) for model in models]
    sessions[0].pin(keep=0.0)
    assert not sessions[0].mask.any() and sessions[1].mask.all()


def test_without_an_optimizer_everything_stays_dense():
    model = net()
    compiled = torch.compile(model, backend="convaware", options=OPTIONS)
    train(compiled, steps=30)
    session = cacompile.session(model)
    assert session.mask.all() and session.flops[1] == 0.0 and session.step_count == 0


def test_a_hand_written_optimizer_steps_through_the_session():
    model = net()
    options = {**OPTIONS, "monitor_every": 1, "tolerance": 1.0, "max_age": 1000}
    compiled = torch.compile(model, backend="convaware", options=options)
    session = cacompile.session(model)
    session.step()  # nothing is known yet: nothing happens
    for i in range(8):
        (compiled(torch.randn(4, 16)).square().mean() / 4**i).backward()
        with torch.no_grad():
            for param in model.parameters():
                param.add_(param.grad, alpha=-0.1)
                param.grad = None if i % 2 else torch.zeros_like(param)
        session.step()
    assert steps_of(model) == {"0.weight": 8, "2.weight": 8}


def test_the_gradients_shrink_and_groups_are_skipped_without_any_help(make: Any, backward: Any, followed: None):
    param, state = make(64, 64, monitor_every=2, max_age=4, tolerance=1.0)
    optimizer, on = optim.SGD([param], lr=0.1), []
    for i in range(30):
        optimizer.zero_grad()
        on.append(state.on.copy())
        backward(state, scale=2.0**-i)
        optimizer.step()
    assert state.column("keep").max() < 0.8 and not np.all(on[2:])
    assert np.all(on[1::2]), "without a mean of gradients, a measurement needs those of its own step"


def test_foreign_optimizers_are_left_alone(make: Any, followed: None):
    state = make(8, 2)[1]
    state.table.set_on(state.rows, False)
    state.skipped[:] = True
    other = nn.Parameter(torch.randn(8, 2))
    optimizer, before = optim.AdamW([other]), state.table.mask_version
    other.grad = grad = torch.randn(8, 2)
    optimizer.step()
    assert other.grad is grad and controllers_of(optimizer) == []
    assert state.table.mask_version == before and state.step == 0 and state.skipped.all()


def test_hooks_of_the_user_see_the_estimate(make: Any, backward: Any, followed: None):
    param, state = make(8, 2)
    optimizer = optim.AdamW([param])
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(param.grad.clone()))
    seen: list[torch.Tensor] = []
    param.grad = torch.ones_like(param)
    optimizer.step()
    state.table.set_on(state.rows, False)
    optimizer.zero_grad()
    backward(state)
    optimizer.step()
    torch.testing.assert_close(seen[1], torch.full_like(param, 0.1))  # (1 - beta1) * 1


def test_one_scope_for_each_set_of_options(make: Any):
    made = [make(8, 2, name=str(i), seed=i % 2) for i in range(4)]
    controllers = make_controllers([state for _, state in made])
    assert [[int(r.name) % 2 for r in controller.params] for controller in controllers] == [[0, 0], [1, 1]]


def test_scopes_follow_the_parameters_of_their_owner(make: Any):
    (a, a_record), (b, b_record) = make(8, 2, name="a"), make(8, 2, name="b")
    controllers = Controllers()

    def held() -> list[Any]:
        return [state for controller in controllers.of(params) for state in controller.params]

    params = [a, nn.Parameter(torch.randn(3))]
    assert held() == [a_record]
    assert controllers.of(params) == controllers.of(list(params))
    params[0] = b  # as many as before, but others
    assert held() == [b_record]
    params.append(a)
    assert set(held()) == {a_record, b_record}
    params.append(make(8, 2, name="c")[0])
    assert len(held()) == 3
    assert controllers.of([]) == []


@pytest.mark.parametrize("how", ["add_param_group", "scheduler", "compiled step"])
def test_uses_of_an_optimizer(how: str, make: Any, backward: Any, followed: None):
    (first, first_record), (second, second_record) = make(8, 2, name="first"), make(8, 2, name="second")
    optimizer = optim.AdamW([first] if how == "add_param_group" else [first, second])
    step = torch.compile(optimizer.step, backend="eager") if how == "compiled step" else optimizer.step
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.9) if how == "scheduler" else None
    for i in range(4):
        optimizer.zero_grad()
        for state in (first_record, second_record):
            backward(state)
        if how == "add_param_group" and i == 2:
            optimizer.add_param_group({"params": [second]})
        (optimizer.step if scheduler else step)()
        if scheduler:
            scheduler.step()
    assert first_record.step == 4
    assert second_record.step == (2 if how == "add_param_group" else 4)
