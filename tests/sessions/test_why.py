"""What can be skipped, and why nothing is: in the words of `status`, for families and for the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import cacompile
from cacompile.controller import weigh
from cacompile.sessions.why import small_part
from cacompile.state.registry import registry

OPTIONS = {"block_rows": 16, "warmup_steps": 2, "monitor_every": 2, "tolerance": 1.0, "inner": "aot_eager"}


class Run:
    """An embedding, which stays dense, and two layers of neurons in training."""

    def __init__(self, lr: float = 1e-6, **options: Any) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
        self.model = nn.Sequential(nn.Embedding(8, 16), *layers)
        self.call = torch.compile(self.model, backend="convaware", options={**OPTIONS, **options})
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=lr)
        self.session = cacompile.session(self.model)

    def train(self, steps: int) -> cacompile.sessions.status.Status:
        for _ in range(steps):
            self.call(torch.randint(8, (32,))).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return cacompile.status(self.model)

    def whys(self) -> list[str]:
        return [family.why for family in cacompile.status(self.model).families]


def test_a_model_that_was_never_compiled_with_us_is_told_of_it():
    found = cacompile.status(nn.Linear(4, 4))
    assert "has not been trained with backend='convaware'" in str(found) and "0 of 0" not in str(found)
    assert found.to_dict() == {} and found.why == str(found)


def test_a_model_without_anything_to_skip_says_why(tmp_path: Any):
    model = nn.Embedding(8, 16)
    torch.compile(model, backend="convaware", options={"inner": "aot_eager"})(torch.arange(8)).sum().backward()
    found = cacompile.status(model)
    assert str(found).startswith("0 of 1 weights can be skipped\nNothing can be skipped: an embedding")
    cacompile.session(model).report(tmp_path / "run.txt")
    page = (tmp_path / "run.txt").read_text(encoding="utf-8")
    assert page.startswith("Nothing can be skipped") and "not been trained" not in page and "scatter" in page


def test_what_can_be_skipped_and_from_when_on():
    run = Run()
    found = run.train(1)
    assert found.can == "3 of 4 weights can be skipped, from step 2 on"
    assert found.why == "Nothing is skipped in the first 2 steps (option warmup_steps)."
    assert found.can in str(found) and found.why in str(found)
    assert set(run.whys()) == {"warms up until step 2"}
    found = run.train(8)
    assert found.why == "" and found.saved_flops > 0 and "" in run.whys()


@pytest.mark.parametrize(
    ("settings", "family", "sentence"),
    [
        ({"tolerance": 0.0}, "the option tolerance is 0", "The option tolerance is 0: nothing may be skipped."),
        ({"max_skip": 0.0}, "the option max_skip is 0", "The option max_skip is 0: nothing may be skipped."),
        ({"keep": ("*",)}, "kept by the option keep", "Nothing is skipped now. 2 of 2 families: kept by the option"),
        ({"lr": 0.3}, weigh.FAST, "still moves fast"),
        ({"lr": 0.0}, weigh.NOTHING_WON, weigh.NOTHING_WON),
        ({"monitor_every": 50}, weigh.UNREAD, "Scores are read every 50 steps; 4 have been done."),
    ],
)
def test_why_nothing_is_skipped(settings: dict[str, Any], family: str, sentence: str, tmp_path: Any):
    run = Run(**settings)
    found = run.train(4)
    assert family in run.whys() and sentence in found.why
    assert found.saved_flops == 0 and found.why in str(found)
    state = run.session.state_dict()
    cacompile.report_state(state, tmp_path / "run.txt")
    assert sentence.split(":")[0] in " ".join((tmp_path / "run.txt").read_text(encoding="utf-8").split())
    again = Run(**settings)
    again.session.load_state_dict(state)
    again.train(1)
    assert family in again.whys(), "known of the state, before the next measurement"


def test_what_of_a_budget_cannot_be_saved_is_told():
    found = Run(budget=0.03).train(6)
    assert found.skipped and not found.short and not found.why
    run = Run(budget=1.0, max_skip=0.5)
    assert run.train(1).short == "", "nothing is decided yet"
    found = run.train(6)
    dw, whole = found.dw_flops, found.step_flops
    said = f"The option budget asks for 100.0% of a step's FLOPs, and {0.5 * dw / whole:.1%} are saved"
    assert found.short.startswith(said) and "max_skip (0.5)" in found.short and found.short in str(found)


def test_pinned_and_frozen_are_shown_as_such():
    run = Run()
    run.train(1)
    first, last = run.session.families
    run.session.pin({first: True, last: False})
    assert run.whys() == ["pinned on", "pinned off"] and cacompile.status(run.model).why == ""
    run.session.pin(keep=1.0)
    assert cacompile.status(run.model).why == "A mask is pinned that keeps everything."
    run.session.unpin()
    run.session.freeze(first)
    run.train(4)
    assert run.whys()[0] == "frozen" and "frozen since step 1" in str(cacompile.status(run.model))


def test_the_policy_is_asked_once_after_each_decision(monkeypatch: pytest.MonkeyPatch):
    run = Run(lr=0.3)
    run.train(4)
    asked: list[int] = []
    monkeypatch.setattr(
        "cacompile.sessions.why.why_dense", lambda of, _: asked.append(1) or ["asked"] * len(of.descent)
    )
    run.session.judged = None
    for _ in range(3):
        run.whys()
    assert len(asked) == 1
    run.train(2)
    run.whys()
    assert len(asked) == 2
    assert all(registry.find(param).decided[1] == 6 for param in run.model[1].parameters() if param.dim() > 1)


@pytest.mark.parametrize(("dw", "warned"), [(1.0, True), (1.99, True), (2.0, False), (3.3, False)])
def test_a_small_part_is_warned_of(dw: float, warned: bool):
    assert bool(small_part(dw, 10.0)) is warned
    assert small_part(0.0, 0.0) == ""


def test_old_names_of_numbers_still_work_and_new_ones_say_share_or_amount():
    found = Run().train(8)
    assert (
        found.saved_step == found.saved_flops / found.step_flops < found.saved_dw == found.saved_flops / found.dw_flops
    )
    assert (0.0 < found.dw_of_step <= 1 / 3 and found.skipped_step < found.skipped_dw) or not found.skipped
    with pytest.warns(DeprecationWarning, match="skipped_flops is now .*skipped_dw"):
        assert found.skipped_flops == found.skipped_dw
    with pytest.warns(DeprecationWarning, match="total_flops is now .*dw_flops"):
        assert found.total_flops == found.dw_flops
    logged = found.to_dict()
    assert all(isinstance(value, float) and name.startswith("convaware/") for name, value in logged.items())
    assert found.to_dict("train/").keys() == {name.replace("convaware/", "train/") for name in logged}
    with pytest.warns(DeprecationWarning, match="families"):
        assert logged["families"][0]["groups"] == found.families[0].groups
    with pytest.raises(KeyError):
        logged["families of"]
