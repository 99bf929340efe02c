"""Pins, names, and saving: a run that was interrupted goes on as if it had not been."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim

import cacompile
from cacompile.errors import ConvAwareError, shown
from cacompile.sessions.session import Session

OPTIONS = {
    "block_rows": 16,
    "warmup_steps": 5,
    "monitor_every": 2,
    "tolerance": 0.3,
    "max_age": 6,
    "inner": "aot_eager",
}
OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adamw": lambda p: optim.AdamW(p, lr=0.01),
    "clipped": lambda p: optim.AdamW(p, lr=0.01),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd": lambda p: optim.SGD(p, lr=0.1),
}


class Run:
    """A model in training, from the same seed every time; keeps what it did."""

    def __init__(self, optimizer: str = "adamw", width: int = 96, **options: Any) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, width), nn.GELU(), nn.Linear(width, 32))
        self.compiled = torch.compile(self.model, backend="convaware", options={**OPTIONS, **options})
        self.clip = optimizer == "clipped"
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.session: Session = cacompile.session(self.model)
        self.losses: list[Tensor] = []
        self.masks: list[Tensor] = []

    def backward(self, seed: int) -> Tensor:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
        loss = (self.compiled(x) - x.repeat(1, 2).sin()).square().mean()
        loss.backward()
        return loss.detach()

    def train(self, start: int, stop: int) -> None:
        for step in range(start, stop):
            self.losses.append(self.backward(step))
            self.masks.append(self.session.mask.clone())
            if self.clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), 0.01)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def save(self) -> bytes:
        file = io.BytesIO()
        parts = (self.model, self.optimizer, self.session)
        torch.save([part.state_dict() for part in parts], file)
        return file.getvalue()

    def load(self, file: bytes) -> None:
        saved = torch.load(io.BytesIO(file), weights_only=True)
        for part, state in zip((self.model, self.optimizer, self.session), saved, strict=True):
            part.load_state_dict(state)


@pytest.fixture
def run() -> Run:
    """After one backward: 6 groups, rows of "0.weight" and columns of "2.weight"."""
    run = Run()
    run.backward(0)
    return run


def same(a: Any, b: Any) -> bool:
    """Equal state dicts; NaN equals NaN."""
    if isinstance(a, Tensor):
        return torch.equal(torch.nan_to_num(a.double(), -1.0), torch.nan_to_num(b.double(), -1.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def timeless(state: dict[str, Any]) -> dict[str, Any]:
    """Without the clock, the one thing that is never the same twice."""
    assert state["history"]["seconds"].diff().gt(0).all()
    return {**state, "history": without(state["history"], "seconds")}


@pytest.mark.parametrize(
    ("optimizer", "late"),
    [("adamw", True), ("adamw", False), ("clipped", False), ("clipped", True), ("momentum", False), ("sgd", True)],
)
@pytest.mark.usefixtures("however_fast")
def test_resuming_is_bit_exact(optimizer: str, late: bool):
    """The state is loaded before the first forward pass, or late: into a model that has trained on its own."""
    whole = Run(optimizer)
    whole.train(0, 15)
    file, state = whole.save(), whole.session.state_dict()
    whole.train(15, 30)
    assert whole.session.flops[1] > 0 and len({m.numpy().tobytes() for m in whole.masks[15:]}) > 3
    second = Run(optimizer)
    if late:
        second.train(90, 97)
        second.optimizer.state.clear()
    second.load(file)
    second.losses, second.masks = [], []
    assert same(second.session.state_dict(), state)
    second.train(15, 30)
    assert torch.equal(torch.stack(second.masks), torch.stack(whole.masks[15:]))
    assert torch.equal(torch.stack(second.losses), torch.stack(whole.losses[15:]))
    for a, b in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert same(timeless(second.session.state_dict()), timeless(whole.session.state_dict()))


def test_a_step_that_was_begun_is_finished_after_loading(run: Run):
    """Between backward and step, what was skipped is part of the state."""
    run.session.pin(keep=0.0)
    run.backward(1)
    state = run.session.state_dict()
    other = Run()
    other.backward(0)
    other.session.load_state_dict(state)
    assert all(r.skipped.all() for r in other.session.params.values() if r.blocks)


def test_other_blocks_start_anew(run: Run, caplog: pytest.LogCaptureFixture):
    run.session.pin([False] * 6)
    run.train(0, 8)
    other = Run(block_rows=8)
    other.session.load_state_dict(run.session.state_dict())
    other.backward(0)
    assert "blocks of 16 rows" in caplog.text and "blocks of 8" in caplog.text
    assert len(other.session.mask) == 12 and other.session.mask.all() and other.session.scores.isnan().all()
    assert other.session.step_count == 8


def test_groups_have_names_and_an_order(run: Run):
    assert run.session.groups == [f"0.neurons[{i}:{i + 16}]" for i in range(0, 96, 16)]
    assert run.session.families == ["0.neurons"]
    assert run.session.mask.dtype == torch.bool and run.session.mask.all()
    assert (run.session.keep == 1).all() and run.session.scores.isnan().all()


def test_the_session_is_the_same_for_the_model_and_what_was_compiled_of_it(run: Run):
    assert cacompile.session(run.compiled) is run.session
    part = cacompile.session(run.model[2])
    assert part.groups == [f"neurons[{i}:{i + 16}]" for i in range(0, 96, 16)]
    part.pin([True] * 5 + [False])
    assert run.session.mask.tolist() == [True] * 5 + [False]
    assert run.session.params["0.weight"].on.all(), "only what it was asked for"


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ({"0.weight": False}, [0] * 6),
        ({"0.weight": False, "2.weight": True}, [0] * 6),
        ({}, [1] * 6),
        ({"0.neurons[16:32]": False, "0.neurons[64:80]": False}, [1, 0, 1, 1, 0, 1]),
        ({"0.neurons": False, "0.neurons[16:32]": True}, [0, 1, 0, 0, 0, 0]),
        ({"2.weight": False, "0.neurons[0:16]": True}, [1, 0, 0, 0, 0, 0]),
        ([True, False] * 3, [1, 0, 1, 0, 1, 0]),
        (np.array([True, False] * 3), [1, 0, 1, 0, 1, 0]),
        ({"0.weight": np.False_}, [0] * 6),
        (torch.tensor([[1, 0, 0], [0, 1, 1]]).bool(), [1, 0, 0, 0, 1, 1]),
    ],
)
def test_pin(mask: Any, expected: list[int], early: bool):
    run = Run(tolerance=0.0)
    if not early:
        run.backward(0)
    elif not isinstance(mask, dict) or any("neurons" in name for name in mask):
        with pytest.raises(ValueError, match="first forward"):
            run.session.pin(mask)
        return
    run.session.pin(mask)
    run.train(0, 8)
    assert all(m.int().tolist() == expected for m in run.masks)
    run.session.unpin()
    assert run.session.mask.all()


def test_a_drawn_pin_is_a_function_of_its_seed(run: Run):
    masks = []
    for seed in (1, 1, *range(2, 20)):
        run.session.pin(keep=0.5, seed=seed)
        masks.append(run.session.mask.clone())
    assert torch.equal(masks[0], masks[1])
    assert len({m.numpy().tobytes() for m in masks}) > 5
    assert {int(m.sum()) for m in masks} == {3}
    for keep in (0, 1.0):
        run.session.pin(keep=keep)
        assert (run.session.mask == bool(keep)).all()


def test_a_pin_made_after_loading_wins_over_the_saved_one(run: Run):
    run.session.pin(keep=0.0)
    other = Run()
    other.session.load_state_dict(run.session.state_dict())
    other.session.pin(keep=1.0)
    assert other.session.state_dict()["parameters"]["0.weight"]["pin"] == (None, 1.0, 0)
    other.backward(0)
    assert other.session.mask.all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([True] * 5,), ["6 groups", "got 5"]),
        ((torch.ones(7).bool(),), ["6 groups", "got 7"]),
        ((3,), ["sequence", "got 3"]),
        (("0.weight",), ["sequence", "got '0.weight'"]),
        (({"0.wieght": False},), ["unknown", "'0.wieght'", "did you mean '0.weight'"]),
        (({"0.weight": False, "0.neurons[0:8]": False},), ["'0.neurons[0:8]'", "did you mean '0.neurons[0:16]'"]),
        ((None, 1.5), ["keep", "between 0 and 1", "1.5"]),
        ((None, float("nan")), ["keep", "nan"]),
        ((None, True), ["keep", "True"]),
        ((None, "0.5"), ["keep", "'0.5'"]),
        ((None, np.float32("inf")), ["keep", "inf"]),
        ((None, 10**5000), ["keep", "between 0 and 1", "of type int"]),
        ((None, torch.ones(2)), ["keep", "tensor([1., 1.])"]),
        ((None, 0.5, 1.0), ["seed", "1.0"]),
        ((None, 0.5, 2**70), ["seed", str(2**70), str(2**64 - 1)]),
        (([True] * 6, None, "1"), ["seed", "'1'"]),
        ((torch.full((6,), 0.3),), ["mask", "of bool", "float32", "0.3"]),
        ((torch.arange(6),), ["mask", "of bool", "int64", "[0, 1, 2, 3, 4, 5]"]),
        ((np.arange(6),), ["mask", "of bool", "int64"]),
        ((torch.ones(6, dtype=torch.bool, device="meta"),), ["mask", "meta"]),
        (([math.nan] * 6,), ["mask", "of bool", "nan as entry 0"]),
        ((["False"] * 6,), ["mask", "of bool", "'False' as entry 0"]),
        (([True] * 5 + [None],), ["mask", "None as entry 5"]),
        (([1, 0] * 3,), ["mask", "of bool", "1 as entry 0"]),
        ((b"010101",), ["mask", "b'010101'"]),
        (({True, False},), ["mask", "{False, True}"]),
        (({"0.weight": "no"},), ["mask['0.weight']", "True or False", "'no'"]),
        (({"0.weight": True, "0.neurons": 0.3},), ["mask['0.neurons']", "True or False", "0.3"]),
        (({"0.weight": torch.tensor(True)},), ["mask['0.weight']", "tensor(True)"]),
        (({3: True},), ["unknown", "3", "known"]),
        ((None, 0.5, -1), ["seed", ">= 0", "-1"]),
        ((None,), ["mask or keep", "neither"]),
        (([True] * 6, 0.5), ["mask or keep", "both"]),
    ],
    ids=shown,
)
def test_a_wrong_pin_is_one_clear_error_and_changes_nothing(run: Run, arguments: tuple, words: list[str]):
    run.session.pin([True, False, True, True, False, True])
    before = run.session.state_dict()
    mask, keep, seed = (*arguments, *(None, None, 0)[len(arguments) :])
    with pytest.raises(ConvAwareError) as error:
        run.session.pin(mask, keep=keep, seed=seed)
    assert all(word in str(error.value) for word in words), error.value
    assert same(run.session.state_dict(), before)


def without(state: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda s: None, ["format 4 to 8", "NoneType"]),
        (lambda s: {**s, "format": 9}, ["format 4 to 8", "got format 9"]),
        (lambda s: {"weight": torch.ones(2)}, ["format 4 to 8", "got a mapping with ['weight']"]),
        (lambda s: {**s, "format": torch.ones(2)}, ["format 4 to 8", "tensor([1., 1.])"]),
        (lambda s: [s], ["format 4 to 8", "list"]),
        (lambda s: {**s, "more": 1}, ["unknown key of state_dict: 'more'", "flops"]),
        (lambda s: {**s, "agreements": None}, ["agreements", "None"]),
        (lambda s: {**s, "agreements": [{"every": 2}]}, ["agreements", "'every': 2"]),
        (lambda s: {**s, "flops": (10**400, 0)}, ["flops", "two finite numbers >= 0", "1000"]),
        (lambda s: {**s, "flops": (math.nan, 0.0)}, ["flops", "nan"]),
        (lambda s: {**s, "flops": (-1.0, 0.0)}, ["flops", ">= 0", "-1.0"]),
        (lambda s: {**s, "backwards": (10**25, 0)}, ["backwards", f"<= {2**62}", "10000"]),
        (lambda s: {**s, "groups": b"all"}, ["groups", "list of names", "b'all'"]),
        (lambda s: {**s, "about": {"options": {}}}, ["about", "lacks graphs"]),
        (lambda s: {**s, "about": {**s["about"], "options": {"seed": None}}}, ["about: options['seed']", "None"]),
        (lambda s: {**s, "pin": True}, ["pin", "mapping", "bool"]),
        (lambda s: {**s, "pin": {**s["pin"], "keep": math.nan}}, ["pin: keep", "between 0 and 1", "nan"]),
        (lambda s: {**s, "pin": {**s["pin"], "seed": -1}}, ["pin: seed", "-1"]),
        (
            lambda s: {**s, "pin": {**s["pin"], "blocks": {"0.weight": [1]}}},
            ["pin: blocks['0.weight']", "bools", "[1]"],
        ),
        (
            lambda s: {**s, "pin": {**s["pin"], "params": {"0.weight": "no"}}},
            ["pin: params['0.weight']", "bool", "'no'"],
        ),
        (lambda s: without(s, "flops"), ["lacks flops"]),
        (lambda s: {**s, "flops": None}, ["flops", "two finite numbers", "got None"]),
        (lambda s: {**s, "flops": (1.0, "2")}, ["flops", "two finite numbers", "'2'"]),
        (lambda s: {**s, "backwards": (1, -2)}, ["backwards", "two ints >= 0", "-2"]),
        (lambda s: {**s, "about": None}, ["about", "mapping", "None"]),
        (lambda s: {**s, "groups": "all"}, ["groups", "list of names", "'all'"]),
        (lambda s: {**s, "parameters": None}, ["parameters", "mapping", "None"]),
        (lambda s: {**s, "parameters": without(s["parameters"], "2.weight")}, ["lacks 1", "'2.weight'"]),
        (lambda s: {**s, "parameters": {**s["parameters"], "3.weight": {}}}, ["unknown", "'3.weight'", "'2.weight'"]),
        (
            lambda s: {**s, "parameters": {**s["parameters"], "2.bias": without(s["parameters"]["2.bias"], "step")}},
            ["'2.bias'", "lacks step"],
        ),
    ],
)
def test_a_wrong_state_is_one_clear_error_and_changes_nothing(run: Run, spoil: Callable[..., Any], words: list[str]):
    run.session.pin([True, False, True, True, False, True])
    before = run.session.state_dict()
    saved = run.session.state_dict()
    saved["parameters"]["0.weight"]["step"] = 77
    with pytest.raises(ValueError) as error:
        run.session.load_state_dict(spoil(saved))
    assert all(word in str(error.value) for word in words), error.value
    assert same(run.session.state_dict(), before)


def test_the_state_of_another_model_is_refused(run: Run):
    before, other = run.session.state_dict(), Run(width=80)
    with pytest.raises(ValueError, match=r"'0.weight' is for shape \(80, 16\), the model's parameter has \(96, 16\)"):
        run.session.load_state_dict(other.session.state_dict())
    assert same(run.session.state_dict(), before)


@pytest.mark.parametrize(
    ("loss", "step", "words"),
    [
        ("3.0", None, "loss must be a number or a tensor of one, got '3.0'"),
        (True, None, "loss .* got True"),
        (None, None, "loss .* got None"),
        (1j, None, "loss .* got 1j"),
        (10**400, None, "loss .* got"),
        (torch.ones(3), None, "loss .* got tensor"),
        (1.0, "x", "step must be an int >= 0 .* got 'x'"),
        (1.0, -1, "step .* got -1"),
        (1.0, 1.5, "step .* got 1.5"),
        (1.0, 2**63, "step .* got 9223372036854775808"),
    ],
)
def test_what_is_no_loss_is_one_clear_error_and_not_kept(run: Run, loss: Any, step: Any, words: str):
    run.session.note_loss(torch.tensor([2.0]), np.int64(1))
    with pytest.raises(cacompile.ConvAwareError, match=words):
        run.session.note_loss(loss, step)
    assert [values.tolist() for values in run.session.losses] == [[1], [2.0]]
    run.session.load_state_dict(run.session.state_dict())


def test_a_prefix_of_numbers_is_text(run: Run):
    with pytest.raises(cacompile.ConvAwareError, match="prefix must be of type str, got 3"):
        cacompile.status(run.model).to_dict(3)  # type: ignore[arg-type]


def test_only_modules_have_sessions():
    with pytest.raises(ValueError, match=r"torch\.nn\.Module, got function"):
        cacompile.session(lambda x: x)
