"""A pin is the model's: it holds for parameters that come later, by what it says, until `unpin`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cacompile
from cacompile.sessions.session import Session

OPTIONS = {"block_rows": 16, "warmup_steps": 2, "monitor_every": 2, "tolerance": 1.0, "inner": "aot_eager"}
WIDTH = 64
"""4 groups of hidden neurons in each layer."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, WIDTH, bias=False), nn.Linear(WIDTH, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Run:
    """Two layers in training."""

    def __init__(self, **options: Any) -> None:
        self.model = nn.ModuleList([Layer(), Layer()])
        self.compiled = torch.compile(self.forward, backend="convaware", options={**OPTIONS, **options})
        self.session: Session = cacompile.session(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model:
            x = layer(x)
        return x

    def train(self, steps: int) -> float:
        """Share of the dW FLOPs that was skipped in these steps."""
        held = {id(param) for group in self.optimizer.param_groups for param in group["params"]}
        if new := [param for param in self.model.parameters() if id(param) not in held]:
            self.optimizer.add_param_group({"params": new})
        before = self.session.flops
        for _ in range(steps):
            self.compiled(torch.randn(16, 16)).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        total, saved = (now - then for now, then in zip(self.session.flops, before))
        return saved / total

    def on(self, name: str) -> list[bool]:
        return self.session.params[name].on.tolist()


def unfreeze(run: Run) -> None:
    run.model[1].requires_grad_(True)


def assign(run: Run) -> None:
    run.model.load_state_dict(copy.deepcopy(run.model.state_dict()), assign=True)


def untie(run: Run) -> None:
    run.model[1].up.weight = nn.Parameter(torch.randn(WIDTH, 16))


def put_in(run: Run) -> None:
    run.model.append(Layer())


def replace(run: Run) -> None:
    run.model[1] = Layer()


PREPARE: dict[Callable[[Run], None], Callable[[Run], Any]] = {
    unfreeze: lambda run: run.model[1].requires_grad_(False),
    untie: lambda run: setattr(run.model[1].up, "weight", run.model[0].up.weight),
}
CHANGES = [unfreeze, assign, untie, put_in, replace]


@pytest.fixture
def run() -> Run:
    return Run()


@pytest.fixture
def still() -> Run:
    """Skips nothing but what is pinned."""
    return Run(tolerance=0.0)


@pytest.mark.usefixtures("however_fast")
@pytest.mark.thin(2)
@pytest.mark.parametrize("early", [False, True], ids=["", "early"])
@pytest.mark.parametrize("change", CHANGES)
def test_turned_off_stays_off(run: Run, change: Callable[[Run], None], early: bool):
    PREPARE.get(change, lambda run: None)(run)
    if not early:
        assert run.train(8) > 0.0
    run.session.pin(keep=1.0)
    assert run.train(8) == 0.0
    change(run)
    assert run.train(8) == 0.0
    assert all(param.pin is not None for param in run.session.params.values())
    run.session.unpin()
    assert run.train(8) > 0.0
    assert all(param.pin is None for param in run.session.params.values())


@pytest.mark.parametrize("change", CHANGES)
def test_a_drawn_pin_holds_for_what_comes(run: Run, change: Callable[[Run], None]):
    PREPARE.get(change, lambda run: None)(run)
    run.session.pin(keep=0.0)
    assert run.train(2) == 1.0
    change(run)
    assert run.train(2) == 1.0
    assert not run.session.mask.any()


@pytest.mark.thin(2)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("listed", [False, True])
def test_a_mask_holds_for_what_has_its_names(still: Run, change: Callable[[Run], None], listed: bool):
    run = still
    PREPARE.get(change, lambda run: None)(run)
    run.train(4)
    first, *others = run.session.groups[:4]
    off = {first: False, others[1]: False}
    run.session.pin([off.get(name, True) for name in run.session.groups] if listed else off)
    before = run.session.mask
    change(run)
    run.train(8)
    assert run.on("0.up.weight") == run.on("0.down.weight") == [False, True, False, True]
    named = [False, True, False, True] if change is untie else [True] * 4
    assert run.on("1.up.weight") == run.on("1.down.weight") == named
    assert int((~run.session.mask).sum()) == int((~before).sum()) == 2


@pytest.mark.usefixtures("however_fast")
@pytest.mark.parametrize("on", [False, True])
def test_a_mask_by_names_leaves_all_others_to_the_controller(run: Run, on: bool):
    run.train(8)
    named, *others = run.session.groups
    before = run.session.keep
    run.session.pin({named: on})
    assert torch.equal(run.session.keep[1:], before[1:]) and run.session.keep[0] == float(on)
    seen = []
    for _ in range(8):
        run.train(1)
        seen.append(run.session.mask)
    mask = torch.stack(seen)
    assert (mask[:, 0] == on).all() and mask[:, 1:].any() and not mask[:, 1:].all()
    assert run.session.params["1.up.weight"].pin is None and others


def test_a_mask_by_names_leaves_what_another_session_has_pinned(run: Run):
    run.train(1)
    cacompile.session(run.model[1]).pin(keep=0.0)
    run.session.pin({"0.up.weight": True})
    put_in(run)
    run.train(4)
    assert all(run.on("0.up.weight")) and not any(run.on("1.up.weight"))
    run.session.pin({"0.down.weight": False})
    assert run.session.params["0.up.weight"].pin is None, "one pin takes the place of the last"
    with pytest.raises(cacompile.ConvAwareError, match=r"'0\.up\.wieght'; did you mean '0\.up\.weight'\?"):
        run.session.pin({"0.up.wieght": True})


def test_a_weight_that_comes_into_a_named_group_is_held_with_it(still: Run):
    """Whatever the group is called once it is there: without its rows it is a group of columns."""
    run = still
    run.model[1].up.requires_grad_(False)
    run.train(1)
    [family] = {name for name in run.session.families if name.startswith("1")}
    run.session.pin({f"{family}[16:32]": False})
    run.model[1].up.requires_grad_(True)
    run.train(4)
    assert f"{family}[16:32]" not in run.session.groups
    assert run.on("1.up.weight") == run.on("1.down.weight") == [True, False, True, True]


def test_a_frozen_parameter_can_be_named(still: Run):
    run = still
    run.model[1].requires_grad_(False)
    run.session.pin({"1.up.weight": False})
    run.train(1)
    run.model[1].requires_grad_(True)
    run.train(4)
    assert not any(run.on("1.up.weight")) and all(run.on("1.down.weight")) and all(run.on("0.up.weight"))


def test_a_parameter_that_was_named_while_tied_is_held_apart_as_well(run: Run):
    run.model[1].up.weight = run.model[0].up.weight
    run.session.pin({"0.up.weight": False})
    run.train(1)
    untie(run)
    run.train(2)
    assert not any(run.on("0.up.weight") + run.on("1.up.weight"))


def test_a_pin_holds_for_a_weight_that_comes_back(run: Run):
    """Its graph is compiled, and bound to it, from before."""
    first = run.model[1].up.weight
    run.train(1)
    run.model[1].up.weight = nn.Parameter(torch.randn(WIDTH, 16))
    run.train(1)
    run.session.pin(keep=0.0)
    run.model[1].up.weight = first
    assert run.train(1) == 1.0 and not any(run.on("1.up.weight"))


def test_what_has_left_the_model_is_let_go(run: Run):
    left = run.model[1]
    run.session.pin(keep=0.0)
    run.train(1)
    run.model[1] = Layer()
    run.train(1)
    run.session.unpin()
    assert all(param.pin is None and param.on.all() for param in cacompile.session(left).params.values())


def test_of_sessions_that_share_parameters_the_last_one_decides(run: Run):
    run.train(1)
    part = cacompile.session(run.model[1])
    run.session.pin(keep=1.0)
    part.pin(keep=0.0)
    assign(run)
    run.train(1)
    assert not any(run.on("1.up.weight")) and all(run.on("0.up.weight"))
    part.unpin()
    assign(run)
    run.train(1)
    assert run.session.params["1.up.weight"].pin is None and run.session.params["0.up.weight"].pin is not None
    part.pin(keep=0.0)
    run.session.unpin()
    assign(run)
    run.train(1)
    assert all(param.pin is None for param in run.session.params.values())


@pytest.mark.thin(2)
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("how", ["keep", "named", "listed"])
def test_a_pin_goes_on_after_resuming(run: Run, how: str, late: bool):
    run.train(4)
    groups = run.session.groups
    off = [name == groups[1] for name in groups]
    pins = {"keep": {"keep": 0.0}, "named": {"mask": {groups[1]: False}}, "listed": {"mask": [not o for o in off]}}
    run.session.pin(**pins[how])
    state = copy.deepcopy(run.session.state_dict())
    other = Run(**({"tolerance": 0.0} if how == "named" else {}))
    if late:
        other.train(4)
    other.session.load_state_dict(state)
    assert other.session.state_dict()["pin"] == state["pin"]
    put_in(other)
    assign(other)
    other.train(3)
    assert other.on("0.up.weight") == ([False] * 4 if how == "keep" else [True, False, True, True])
    assert other.on("2.up.weight") == [how != "keep"] * 4
    other.session.unpin()
    assert other.session.mask.all() and other.session.state_dict()["pin"] is None


def test_a_state_of_a_run_with_new_parameters_can_be_loaded(run: Run):
    """They count their steps from 0, after a history that has more."""
    run.train(8)
    run.session.load_state_dict(run.session.state_dict())
    assign(run)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-5)
    run.train(4)
    assert run.session.step_count == 4
    run.session.load_state_dict(run.session.state_dict())
    assert run.session.history.step.tolist() == [2, 4, 6, 8]


def test_loading_a_state_without_a_pin_ends_one(run: Run):
    state = run.session.state_dict()
    run.session.pin(keep=0.0)
    run.session.load_state_dict(state)
    put_in(run)
    assert run.train(2) == 0.0 and all(param.pin is None for param in run.session.params.values())


def test_other_blocks_than_saved_are_on(run: Run):
    run.train(1)
    run.session.pin([False] * len(run.session.groups))
    state = run.session.state_dict()
    other = Run()
    other.compiled = torch.compile(other.forward, backend="convaware", options={**OPTIONS, "block_rows": 32})
    other.session.load_state_dict(state)
    assert other.train(8) == 0.0


def test_a_copy_of_the_model_is_not_pinned(run: Run):
    run.session.pin(keep=0.0)
    copied = copy.deepcopy(run.model)
    assert all(param.pin is None for param in cacompile.session(copied).params.values())


def test_a_lazy_module_has_a_session_before_its_parameters_have_a_shape():
    model = nn.Sequential(nn.LazyLinear(64), nn.ReLU(), nn.LazyLinear(32))
    session = cacompile.session(model)
    session.pin(keep=0.0)
    for example in ([], [torch.randn(8, 32)]):
        with pytest.raises(cacompile.ConvAwareError, match=r"0\.weight has no shape yet"):
            cacompile.explain(model, *example)
    assert not session.params and not session.groups and session.state_dict()["parameters"] == {}
    run = torch.compile(model, backend="convaware", options={"block_rows": 16, "inner": "aot_eager"})
    run(torch.randn(8, 32)).square().mean().backward()
    run(torch.randn(8, 32)).square().mean().backward()
    assert session.groups and not session.mask.any()
    model.zero_grad()
    run(torch.randn(8, 32)).square().mean().backward()
    assert not model[0].weight.grad.any() and model[0].bias.grad.any()
