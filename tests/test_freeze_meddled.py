"""Frozen as with requires_grad=False, also where users do something of their own: hooks, contexts, requires_grad."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers import Block, compile_all, square_mean, train_step
from torch import Tensor, nn

import cacompile
from cacompile.state import handles

EAGER = {"options": {"inner": "aot_eager"}}


def made(count: int = 3, **options: Any) -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(*(Block() for _ in range(count)))
    return model, compile_all(model, "convaware", options={**EAGER["options"], **options}), cacompile.session(model)


def rows() -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


def without_gradient(model: nn.Module, run: Any) -> list[str]:
    grads = train_step((model, run), [rows()]).grads
    return [name for name, grad in grads.items() if grad is None]


def under(model: nn.Module, *parts: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.startswith(parts)]


@pytest.mark.parametrize("settings", [{}, {"max_truncated": 0}, {"switch": "when compiled"}], ids=str)
def test_what_is_frozen_in_any_forward_decides(settings: dict[str, Any]) -> None:
    """Also in one that saves all: the first of a graph, where none is cut, while a lean one is being compiled."""
    model, run, session = made(**settings)
    for _ in range(2):
        session.freeze("0", "2.up")
        loss = square_mean(run(rows()))
        session.thaw()
        session.freeze("1")
        loss.backward()
        found = [name for name, param in model.named_parameters() if param.grad is None]
        assert found == under(model, "0.", "1.", "2.up")
        session.thaw()
        assert without_gradient(model, run) == []
        model.zero_grad(set_to_none=True)


def test_sets_of_what_is_frozen_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "HANDLES", 2)
    model, run, session = made()
    for part in ("0", "1", "2", "0.up", "0"):
        with session.frozen(part):
            assert without_gradient(model, run) == under(model, part)
    found = vars(session.bindings[0].handles)
    assert len(found["_calls"]) == len(found["_call_of"]) == 2


@pytest.mark.parametrize("first", [False, True], ids=["later", "before the first step"])
@pytest.mark.parametrize("regional", [False, True], ids=["whole", "blocks"])
def test_hooks_of_frozen_parameters_are_not_called(first: bool, regional: bool) -> None:
    """torch would call them with None. Where all of a graph is frozen before it has run once, they see zeros."""
    model = nn.Sequential(*(Block() for _ in range(3)))
    if regional:
        run: Any = model
        for block in model:
            block.compile(backend="convaware", options={"inner": "aot_eager", "block_rows": 16})
    else:
        run = compile_all(model, "convaware", **EAGER)
    session = cacompile.session(model)
    heard: dict[str, Tensor] = {}
    for name, param in model.named_parameters():
        param.register_hook(lambda grad, name=name: heard.__setitem__(name, grad * 1))
        param.register_post_accumulate_grad_hook(
            lambda param, name=name: heard.__setitem__(f"{name}, then", param.grad)
        )
    if not first:
        assert without_gradient(model, run) == []
        assert len(heard) == 24
    names = session.freeze("0", "2.up")
    for step in range(3):
        heard.clear()
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            assert without_gradient(model, run) == names
        called = {name.removesuffix(", then") for name in heard}
        if step == 0 and first and regional:
            assert not any(heard[name].any() for name in names if name in heard)
        else:
            assert called == set(dict(model.named_parameters())) - set(names)
    session.thaw()
    assert without_gradient(model, run) == []


def test_hooks_of_what_is_frozen_between_forward_and_backward_see_zeros() -> None:
    model, run, session = made()
    heard: list[Tensor] = []
    model[0].up.weight.register_hook(lambda grad: heard.append(grad * 1))
    loss = square_mean(run(rows()))
    session.freeze("0")
    loss.backward()
    assert len(heard) == 1 and not heard[0].any() and model[0].up.weight.grad is None


def test_a_context_leaves_groups_frozen_that_were() -> None:
    model, run, session = made()
    train_step((model, run), [rows()])
    group = next(name for name in session.groups if name.startswith("0."))
    session.freeze(group)
    before = session.frozen_since
    with session.frozen("0"):
        assert list(session.frozen_since) == under(model, "0.")
    assert session.frozen_since == before == {group: 0}
    session.freeze("1")
    with session.frozen(*(name for name in session.groups if name.startswith("1."))):
        pass
    assert list(session.frozen_since) == [*under(model, "1."), group]


def test_a_context_ends_whatever_became_of_the_model() -> None:
    """Layers put in, taken out and put back; the last thing to hear of an exception is that a name is gone."""
    model, run, session = made()
    train_step((model, run), [rows()])
    old, last = model[0], model[2]
    with pytest.raises(KeyError), session.frozen("0", "2"):
        model[0] = Block()
        assert without_gradient(model, run) == under(model, "0.", "2.")
        del model[2]
        raise KeyError
    assert without_gradient(model, run) == []
    model[0] = old
    model.append(last)
    assert without_gradient(model, run) == [] and not session.frozen_since


def test_a_pattern_holds_for_what_is_trained_later() -> None:
    model = nn.Sequential(*(Block() for _ in range(3)))
    model[:2].requires_grad_(False)
    run, session = compile_all(model, "convaware", **EAGER), cacompile.session(model)
    train_step((model, run), [rows()])
    assert session.freeze("0", "2.up") == under(model, "2.up")
    with session.frozen("1"):
        pass
    model.requires_grad_(True)
    assert without_gradient(model, run) == under(model, "0.", "2.up")
    session.thaw("0")
    assert without_gradient(model, run) == under(model, "2.up")
    model[0].requires_grad_(False)
    with session.frozen("0"):
        model[0].requires_grad_(True)
        assert without_gradient(model, run) == under(model, "0.", "2.up")
    assert without_gradient(model, run) == under(model, "2.up")


def test_frozen_while_not_trained_outside_of_graphs_too() -> None:
    model, _, session = made(1)
    session.thaw()  # all are known
    model.requires_grad_(False)
    session.freeze("0.up")
    model.requires_grad_(True)
    square_mean(model(rows())).backward()
    assert [name for name, param in model.named_parameters() if param.grad is None] == under(model, "0.up")


def test_a_state_of_parameters_that_are_not_trained_any_more() -> None:
    model, run, session = made()
    train_step((model, run), [rows()])
    model[0].requires_grad_(False)
    session.freeze("1")
    state = copy.deepcopy(session.state_dict())
    other, run, session = made()
    other[0].requires_grad_(False)
    session.load_state_dict(state)
    assert without_gradient(other, run) == under(other, "0.", "1.")
    trained, _, fresh = made()
    fresh.load_state_dict(state)
    state["parameters"] = {name: entry for name, entry in state["parameters"].items() if name.startswith("1")}
    with pytest.raises(cacompile.ConvAwareError, match="lacks 8"):
        fresh.load_state_dict(state)
    assert all(param.requires_grad for param in trained.parameters())
    other[2].requires_grad_(False)
    session.load_state_dict(state)


def test_of_sessions_that_share_a_parameter_the_last_one_decides() -> None:
    """Also of what comes in its place, by either one's names."""
    model, run, whole = made()
    part = cacompile.session(model[0])
    train_step((model, run), [rows()])

    def put_in_anew() -> list[str]:
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
        return without_gradient(model, run)

    whole.freeze("0")
    part.thaw()
    assert put_in_anew() == []
    part.freeze("up")
    whole.thaw()
    assert put_in_anew() == []
    part.freeze("up")
    with whole.frozen("0.down"):
        assert put_in_anew() == under(model, "0.")
    assert put_in_anew() == under(model, "0.up")


def test_a_copy_is_another_model() -> None:
    model, run, session = made()
    train_step((model, run), [rows()])
    session.freeze("0")
    copied = copy.deepcopy(model)
    assert not cacompile.session(copied).frozen_since
    assert without_gradient(copied, compile_all(copied, "convaware", **EAGER)) == []
    cacompile.session(copied).load_state_dict(session.state_dict())
    assert without_gradient(copied, compile_all(copied, "convaware", **EAGER)) == under(copied, "0.")
