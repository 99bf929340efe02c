"""States of earlier versions are read; `format4.pt` was saved by commit 2a4aa09, running `Run` below."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cacompile
from cacompile.errors import ConvAwareError
from cacompile.sessions.formats import FORMAT, OLDEST, upgraded

SAVED = Path(__file__).with_name("format4.pt")
OPTIONS = {"block_rows": 4, "warmup_steps": 3, "monitor_every": 4, "tolerance": 1.0, "seed": 5, "inner": "aot_eager"}


class Run:
    """A small model in training, which clips its gradients; the same on every machine."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))
        self.compiled = torch.compile(self.model, backend="convaware", options=OPTIONS)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.session = cacompile.session(self.model)

    def train(self, start: int, stop: int) -> list[Tensor]:
        """The masks of the steps after each of these."""
        masks = []
        for step in range(start, stop):
            x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
            self.compiled(x).square().mean().backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            masks.append(self.session.mask)
        return masks

    def states(self) -> tuple[Any, ...]:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), self.session.state_dict()))

    def load(self, states: tuple[Any, ...]) -> None:
        for holder, state in zip((self.model, self.optimizer, self.session), states, strict=True):
            holder.load_state_dict(state)


@pytest.fixture(scope="module")
def saved() -> tuple[tuple[Any, ...], list[Tensor]]:
    """The states after 12 steps, and the masks of the 8 steps after those."""
    return torch.load(SAVED, weights_only=True)


def test_a_run_goes_on_as_it_would_have(saved: tuple[tuple[Any, ...], list[Tensor]]):
    states, masks = saved
    assert states[2]["format"] == 4 and any((~mask).any() for mask in masks)
    run = Run()
    run.load(states)
    assert run.session.step_count == 12 and run.session.flops == tuple(states[2]["flops"])
    until = 13  # the mask that was saved; groups that share one k take their turn together since then
    assert [mask.tolist() for mask in run.train(12, until)] == [mask.tolist() for mask in masks[: until - 12]]
    run.train(until, 20)
    again = run.session.state_dict()
    assert again["format"] == FORMAT and again["history"]["step"].tolist()[:3] == [4, 8, 12]


def test_a_report_of_an_old_state(saved: tuple[tuple[Any, ...], list[Tensor]], capsys: pytest.CaptureFixture[str]):
    cacompile.report_state(saved[0][2], "-")
    assert "0.neurons" in capsys.readouterr().out


def said(run: Run, mask: dict[str, bool]) -> dict[str, Any]:
    """What a state says of a mask by names."""
    run.session.pin(mask)
    pin = run.session.state_dict()["pin"]
    return {name: pin[name] for name in ("blocks", "params")}


@pytest.mark.parametrize("mask", [None, {}, {"0.neurons[4:8]": False, "2.bias": False}, [True, False] * 4])
def test_a_pin_of_format_5_holds_for_the_model(mask: Any):
    """There each parameter had its own, and what was not named was on."""
    run = Run()
    run.train(0, 1)
    if isinstance(mask, dict):
        pin = {**run.session.state_dict(), "pin": {"keep": None, "seed": 0, "rest": True, **said(run, mask)}}
        run.session.load_state_dict(pin)
        run.session._decide(run.session._pin)
    else:
        run.session.pin(mask, keep=0.25 if mask is None else None, seed=0)
    state = run.session.state_dict()
    del state["pin"]
    other = Run()
    other.session.load_state_dict({**state, "format": 5})
    other.model.load_state_dict(copy.deepcopy(run.model.state_dict()), assign=True)
    other.train(0, 1)
    if mask is None:  # new parameters are drawn anew
        assert other.session.mask.sum() == run.session.mask.sum() == 2
    else:
        assert other.session.mask.tolist() == run.session.mask.tolist()
    assert all(param.pin is not None for param in other.session.params.values())


def test_where_only_a_part_was_pinned_format_5_holds_just_that():
    run = Run()
    run.train(0, 1)
    cacompile.session(run.model[2]).pin(keep=0.0)
    state = run.session.state_dict()
    assert state.pop("pin") is None
    other = Run()
    other.session.load_state_dict({**state, "format": 5})
    other.train(0, 1)
    pinned = {name for name, param in other.session.params.items() if param.pin is not None}
    assert pinned == {"2.weight", "2.bias"}


@pytest.mark.parametrize("format", [1, 3, FORMAT + 1, None, "4"])
def test_what_cannot_be_read_says_so(saved: tuple[tuple[Any, ...], list[Tensor]], format: Any):
    session = cacompile.session(nn.Linear(2, 2))
    with pytest.raises(ConvAwareError, match=f"format {OLDEST} to {FORMAT}, got format {format!r}"):
        session.load_state_dict({**saved[0][2], "format": format})


@pytest.mark.parametrize(
    "broken",
    [
        {"format": 4},
        {"format": 4, "history": 3, "parameters": [1]},
        {"format": 5, "parameters": {"weight": {"pin": 3}}},
        {"format": 5, "parameters": {"weight": {"pin": (None, [], 0)}, "bias": {"pin": ([], [], [])}}},
        {"format": 5, "parameters": {"weight": {"pin": (None, torch.ones(2), 0)}, "bias": {"pin": (None, 1.0, 0)}}},
        {"format": 6, "parameters": {"weight": {"blocks": {"age": torch.ones(2).to_sparse()}}}},
        {"format": 7, "parameters": {"weight": {"blocks": {"score": torch.ones(2, dtype=torch.uint8)}}}},
        {"format": 7, "history": {"total": torch.ones(2, dtype=torch.uint8)}},
    ],
)
def test_a_broken_old_state_is_refused_as_a_new_one_is(broken: dict[str, Any]):
    assert upgraded(broken)["format"] == FORMAT
    with pytest.raises(ConvAwareError, match="state_dict"):
        cacompile.session(nn.Linear(2, 2)).load_state_dict(broken)
