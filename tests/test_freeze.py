"""Freezing by name: as with requires_grad=False from the start, and nothing is compiled again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Block, train_step
from torch import nn

import cacompile
from cacompile.errors import ConvAwareError
from cacompile.report.data import RunData
from cacompile.sessions import freezing, view

EAGER = {"inner": "aot_eager", "block_rows": 16, "warmup_steps": 10**6}


def blocks(count: int = 3) -> nn.Module:
    return nn.Sequential(*(Block() for _ in range(count)))


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="convaware", options={**EAGER, **options})


def test_gradients_are_none_and_come_back():
    model = blocks()
    run, session = compiled(model), cacompile.session(model)
    x = [torch.randn(8, 32)]
    dense = train_step((model, run), x)
    assert session.freeze("0.*", "1.up.bias") == [
        "0.up.weight",
        "0.up.bias",
        "0.down.weight",
        "0.down.bias",
        "1.up.bias",
    ]
    assert session.freeze("0") == []
    found = train_step((model, run), x)
    for name, grad in found.grads.items():
        if name.startswith("0.") or name == "1.up.bias":
            assert grad is None, name
        else:
            assert torch.equal(grad, dense.grads[name]), name
    assert session.thaw("0") == ["0.up.weight", "0.up.bias", "0.down.weight", "0.down.bias"]
    assert session.thaw() == ["1.up.bias"]
    again = train_step((model, run), x)
    assert all(torch.equal(grad, dense.grads[name]) for name, grad in again.grads.items())


def test_the_optimizer_does_not_see_it():
    model = blocks(2)
    run, session = compiled(model), cacompile.session(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    def step() -> None:
        run(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    step()
    session.freeze("1")
    assert all(param.grad is None for param in model[1].parameters())
    before = copy.deepcopy((model[1].state_dict(), [optimizer.state[param] for param in model[1].parameters()]))
    step()
    after = model[1].state_dict(), [optimizer.state[param] for param in model[1].parameters()]
    for old, new in zip(before[0].values(), after[0].values()):
        assert torch.equal(old, new)
    for old, new in zip(before[1], after[1]):
        assert all(torch.equal(old[key], new[key]) for key in old)
    session.thaw()
    step()
    step()
    assert [optimizer.state[param]["step"].item() for param in model.parameters()] == [4.0] * 4 + [3.0] * 4


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.1), torch.optim.AdamW])
def test_a_frozen_group_stays_where_it_is(make: Callable[..., torch.optim.Optimizer]):
    model = Block()
    run, session = compiled(model), cacompile.session(model)
    optimizer = make(model.parameters())

    def step() -> None:
        run(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    group = next(name for name in session.groups if name.endswith("[16:32]"))
    assert session.freeze(group) == [group] and session.frozen_since == {group: 1}
    up, down = model.up.weight.detach().clone(), model.down.weight.detach().clone()
    step()
    assert torch.equal(model.up.weight[16:32], up[16:32]) and torch.equal(model.down.weight[:, 16:32], down[:, 16:32])
    assert not torch.equal(model.up.weight[:16], up[:16])
    assert "frozen since step 1" in str(cacompile.status(model)) and cacompile.status(model).skipped_dw == 0.0
    session.thaw(group)
    step()
    assert not torch.equal(model.up.weight[16:32], up[16:32]) and session.frozen_since == {}


def test_a_family_is_all_of_its_weights():
    model = Block()
    run, session = compiled(model), cacompile.session(model)
    x = [torch.randn(8, 32)]
    train_step((model, run), x)
    (family,) = session.families
    assert session.freeze(family) == session.groups
    grads = train_step((model, run), x).grads
    assert [name for name, grad in grads.items() if grad is None] == ["up.weight", "down.weight"]


def test_frozen_while_in_a_context():
    session = cacompile.session(model := blocks())
    session.freeze("0")
    with session.frozen("0", "1.*") as names:
        assert names == [name for name, _ in model.named_parameters() if name.startswith("1.")]
        assert len(session.frozen_since) == 8
    assert list(session.frozen_since) == [name for name, _ in model.named_parameters() if name.startswith("0.")]


@pytest.mark.parametrize(
    ("pattern", "words"), [("1.upp.*", "'1.upp.\\*'.*did you mean '1.up"), ("9", "'9'"), (3, "type str, got 3")]
)
def test_a_pattern_that_matches_nothing(pattern: Any, words: str):
    session = cacompile.session(model := blocks())
    with pytest.raises(ConvAwareError, match=words):
        session.freeze("0", pattern)
    assert session.frozen_since == {} and all(param.grad is None for param in model.parameters())
    with pytest.raises(ConvAwareError, match="at least one"):
        session.freeze()


def test_options_freeze_and_keep():
    model = blocks()
    run = compiled(model, frozen=["0.*", "2.neurons[[]0:*"], keep=("1.up.weight",), warmup_steps=0)
    session = cacompile.session(model)
    x = [torch.randn(8, 32)]
    train_step((model, run), x)
    grads = train_step((model, run), x).grads
    assert [name for name, grad in grads.items() if grad is None] == [n for n in grads if n.startswith("0.")]
    assert not grads["2.up.weight"][:16].any() and grads["2.up.weight"][16:].any()
    assert (
        session.params["1.up.weight"].column("kept").all() and not session.params["1.down.weight"].column("kept").any()
    )
    session.thaw()
    torch._dynamo.reset()
    train_step((model, compiled(model, frozen=["0.*"])), x)
    assert session.frozen_since == {}, "what was thawed stays thawed"


def test_what_is_kept_is_never_skipped(however_fast: None):
    model = blocks(2)
    options = {"tolerance": 1.0, "warmup_steps": 2, "monitor_every": 2, "keep": ["1.up*"]}
    run, session = compiled(model, **options), cacompile.session(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    skipped: set[str] = set()
    for _ in range(20):
        run(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        skipped |= {name for name, on in zip(session.groups, session.mask) if not on}
    assert skipped and all(name.startswith("0.") for name in skipped)


def test_saved_and_restored():
    model = blocks()
    run, session = compiled(model), cacompile.session(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run(torch.randn(8, 32)).sum().backward()
    optimizer.step()
    group = next(name for name in session.groups if name.startswith("2."))
    session.freeze("0", group)
    state = session.state_dict()
    other = blocks()
    view = cacompile.session(other)
    view.load_state_dict(copy.deepcopy(state))
    grads = train_step((other, compiled(other)), [torch.randn(8, 32)]).grads
    assert [name for name, grad in grads.items() if grad is None] == [n for n in grads if n.startswith("0.")]
    assert view.frozen_since == session.frozen_since and set(view.frozen_since.values()) == {1}
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    grads = train_step((other, compiled(other)), [torch.randn(8, 32)]).grads
    assert grads["0.up.weight"] is None and view.frozen_since == session.frozen_since
    view.load_state_dict({**state, "parameters": {n: {**e, "frozen": None} for n, e in state["parameters"].items()}})
    assert list(view.frozen_since) == [group]


def test_eager_parts_are_frozen_too():
    model = blocks(2)
    session = cacompile.session(model)
    session.freeze("0.up.weight", "1.up.weight")
    model[1].compile(backend="convaware", options=EAGER)
    model(torch.randn(4, 32)).sum().backward()
    assert [name for name, param in model.named_parameters() if param.grad is None] == ["0.up.weight", "1.up.weight"]


def test_what_is_frozen_is_told():
    model = blocks(2)
    run, session = compiled(model), cacompile.session(model)
    train_step((model, run), [torch.randn(8, 32)])
    session.freeze("0", "1.neurons[[]0:16]*")
    found = cacompile.explain(model)
    assert {row.param for row in found.rows if row.fate == "frozen since step 0"} == {
        name for name, _ in model.named_parameters() if name.startswith("0.")
    }
    run_data = RunData.of(session.state_dict())
    assert set(run_data.frozen) >= {"0.up.bias", "1.up.weight (1 of 4 blocks)"}


def test_a_pattern_of_an_option_that_names_nothing_is_told_of_once(caplog: pytest.LogCaptureFixture):
    model = blocks(1)
    run = compiled(model, keep=["0.up*", "lm_hed*"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        run(torch.randn(8, 32)).sum().backward()
        optimizer.step()
    (message,) = [record.getMessage() for record in caplog.records if "is no name" in record.getMessage()]
    assert "'keep': 'lm_hed*'" in message


def test_a_gradient_that_is_put_there_past_autograd_is_dropped_before_the_step():
    """As DDP does, whose buckets have zeros for what has got none."""
    model = blocks(1)
    run, session = compiled(model), cacompile.session(model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    run(torch.randn(8, 32)).sum().backward()
    session.freeze("*")
    before = copy.deepcopy(model.state_dict())
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_change_looks_the_model_through_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = blocks()
    compiled(model)(torch.randn(8, 32)).sum().backward()
    session = cacompile.session(model)
    looked: list[str] = []
    look, find = view.named_parameters, freezing.find_params

    def named_parameters(module: nn.Module, **settings: bool) -> Any:
        looked.extend(["model"] if module is model else [])
        return look(module, **settings)

    def find_params(pattern: str, names: Any) -> list[str]:
        looked.append(pattern)
        return find(pattern, names)

    monkeypatch.setattr(view, "named_parameters", named_parameters)
    monkeypatch.setattr(freezing, "find_params", find_params)
    assert session.freeze("0", "1.*")[:2] == ["0.up.weight", "0.up.bias"]
    assert looked == ["model", "0", "1.*"]
    session.thaw("1.*")
    session.freeze("1.*")
    assert looked[3:] == ["model", "model"], "what a pattern fits is known"
    model.append(nn.Module())
    model[3].register_module("up", nn.Linear(4, 4))
    session.thaw("1.*")
    assert looked[5:] == ["model", "1.*"], "until there are other names"
    assert session.freeze("3") == ["3.up.weight", "3.up.bias"]


def test_groups_are_those_of_today() -> None:
    """What is remembered of them ends with the parameters that have them."""
    model = blocks(2)
    run, session = compiled(model), cacompile.session(model)
    run(torch.randn(8, 32)).sum().backward()
    names = session.groups
    session.groups.clear()
    assert session.groups == names and len(session.index.params) == 4
    model[1] = nn.Identity()
    assert session.groups == [name for name in names if name.startswith("0.")]
    assert len(session.index.params) == 2
    torch._dynamo.reset()
    model[1] = Block()
    run(torch.randn(8, 32)).sum().backward()
    assert session.groups == names
    with pytest.raises(ConvAwareError, match="no_such"):
        session.freeze("no_such")
    assert session.freeze("1.neurons") == [name for name in names if name.startswith("1.")]
