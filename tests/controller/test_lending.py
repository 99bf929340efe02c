"""What is skipped whole lends its moment as its gradient: the same weights to the last bit, and no write."""

import pytest
import torch
from torch import nn

import cacompile
from cacompile.controller import estimate, lending


def train(optimizer_kind: type, lend: bool, monkeypatch: pytest.MonkeyPatch, **options) -> tuple[dict, int, list]:
    """(all that the optimizer and the model keep, parameters filled by writing, gradients seen after the steps)."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    compiled = torch.compile(model, backend="convaware", options={"block_rows": 16})
    optimizer = optimizer_kind(model.parameters(), lr=1e-2, **options)
    filled = []
    plain = estimate._fill

    def count(*args):
        filled.append(args[1].name)
        return plain(*args)

    with monkeypatch.context() as patch:
        patch.setattr(estimate, "_fill", count)
        if not lend:
            patch.setattr(lending, "LENDERS", ())
        data = torch.Generator().manual_seed(1)
        seen = []
        for step in range(8):
            compiled(torch.randn(16, 32, generator=data)).square().mean().backward()
            if step == 1:
                cacompile.session(compiled).pin({"0.weight": False, "2.weight": False})
            optimizer.step()
            seen.append(model[2].weight.grad)
            optimizer.zero_grad()
    kept = {f"{i}.{name}": value for i, each in enumerate(optimizer.state.values()) for name, value in each.items()}
    return {**model.state_dict(), **kept}, len(filled), seen


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False, "amsgrad": True}])
def test_the_weights_are_the_same_to_the_bit(kind: type, options: dict, monkeypatch: pytest.MonkeyPatch):
    lent, written_less, seen = train(kind, True, monkeypatch, **options)
    filled, written, _ = train(kind, False, monkeypatch, **options)
    assert lent.keys() == filled.keys() and all(torch.equal(lent[name], filled[name]) for name in lent)
    assert written_less < written
    assert seen[-1] is not None  # the parameter's own again, which is no part of the optimizer's state
    assert not seen[-1].any()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.AdamW, {"maximize": True}),
        (type("Mine", (torch.optim.AdamW,), {}), {}),
    ],
)
def test_where_the_estimate_is_more_than_the_moment_it_is_written(kind, options, monkeypatch: pytest.MonkeyPatch):
    lent, written_less, _ = train(kind, True, monkeypatch, **options)
    filled, written, _ = train(kind, False, monkeypatch, **options)
    assert written_less == written > 0
    assert all(torch.equal(lent[name], filled[name]) for name in lent)


def test_dynamo_sees_no_moment_in_the_place_of_a_gradient(monkeypatch: pytest.MonkeyPatch):
    """It would take both for one, and compile anew for each set of parameters that are skipped."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
    compiled = torch.compile(model, backend="convaware", options={"block_rows": 16})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    step = torch.compile(optimizer.step, backend="eager")
    lent = []
    monkeypatch.setattr(lending, "_moment", lambda *args: lent.append(args))
    for number in range(4):
        compiled(torch.randn(4, 32)).square().mean().backward()
        if number == 1:
            cacompile.session(compiled).pin({"0.weight": False, "2.weight": False})
        (step if number < 3 else optimizer.step)()
        optimizer.zero_grad()
        assert bool(lent) == (number == 3)


def test_after_a_step_that_raised_gradients_are_not_those_of_before():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))
    compiled = torch.compile(model, backend="convaware", options={"block_rows": 16})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)

    def backward() -> torch.Tensor:
        compiled(torch.randn(4, 32)).square().mean().backward()
        return model[0].weight.grad

    backward()
    optimizer.step()
    cacompile.session(compiled).pin({"0.weight": False})
    optimizer.zero_grad()
    own = backward()
    optimizer.param_groups[0]["weight_decay"] = "none"
    with pytest.raises(TypeError):
        optimizer.step()
    optimizer.param_groups[0]["weight_decay"] = 0.0
    assert model[0].weight.grad is optimizer.state[model[0].weight]["exp_avg"], "the step has not come to its end"
    optimizer.step()
    assert model[0].weight.grad is own
    model[0].weight.grad = other = torch.zeros(64, 32)
    optimizer.step()
    assert model[0].weight.grad is other
