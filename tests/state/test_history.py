"""What is kept of a run: the truth of each measurement, evenly spread, bounded, one history however often resumed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

import cacompile
from cacompile.errors import ConvAwareError
from cacompile.sessions.checkpoint import check_history
from cacompile.state import history
from cacompile.state.series import Series

EVERY = 2
OPTIONS = {"block_rows": 16, "warmup_steps": 5, "monitor_every": EVERY, "tolerance": 0.5, "inner": "aot_eager"}


@pytest.mark.parametrize(
    ("every", "measurements", "limit"), [(1, 3, 4), (20, 4, 4), (20, 5, 4), (7, 100, 16), (3, 1000, 5)]
)
def test_a_series_keeps_evenly_spread_steps(every: int, measurements: int, limit: int):
    series = Series((2,), float)
    for step in range(every, every * measurements + 1, every):
        series.add(step, np.array([step, -step]), every=every, limit=limit)
    stride = next(2**i for i in range(20) if measurements // 2**i <= limit)
    assert series.stride == stride and len(series.steps) == measurements // stride
    assert series.steps.tolist() == list(range(every * stride, every * measurements + 1, every * stride))
    assert (series.rows == series.steps[:, None] * [1, -1]).all()
    between = series.at(series.steps + every * stride - 1)
    assert (between == series.rows).all() and np.isnan(series.at(np.array([0]))).all()


def test_a_step_counts_once_and_time_goes_forward():
    series = Series((), float)
    for step, value in [(10, 1.0), (20, 2.0), (20, 3.0), (10, 4.0)]:
        series.add(step, np.array(value), every=10, limit=8)
    assert series.steps.tolist() == [10, 20] and series.rows.tolist() == [1.0, 3.0]


class Run:
    """A small model in training; keeps beside the history what the session says after every step."""

    def __init__(self, optimizers: int = 1, **options: Any) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 96), nn.GELU(), nn.Linear(96, 32), nn.GELU(), nn.Linear(32, 32))
        self.compiled = torch.compile(self.model, backend="convaware", options={**OPTIONS, **options})
        layers = [self.model[i] for i in (0, 2, 4)]
        parts = [nn.ModuleList(layers[i::optimizers]) for i in range(optimizers)]
        self.optimizers = [optim.AdamW(part.parameters(), lr=0.01) for part in parts]
        self.session = cacompile.session(self.model)
        self.seen: dict[int, dict[str, Any]] = {}

    def train(self, start: int, stop: int) -> Run:
        for step in range(start, stop):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
            (self.compiled(x) - x.repeat(1, 2).sin()).square().mean().backward()
            skipped = int((~self.session.mask).sum())
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
            self.seen[step + 1] = {
                "totals": (*self.session.flops, *self.session.backwards),
                "skipped": skipped,
                "keep": self.session.keep,
            }
        return self


@pytest.fixture(scope="module", params=[1, 2], ids=["one optimizer", "two optimizers"])
def trained(request: pytest.FixtureRequest) -> Run:
    """24 steps; from warm-up on something is skipped."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cacompile.controller.policy.FAST", np.inf)
        return Run(request.param).train(0, 24)


def test_a_history_says_what_happened(trained: Run):
    kept = trained.session.history
    assert kept.step.tolist() == list(range(EVERY, 25, EVERY)) and kept.stride == 1
    for i, step in enumerate(kept.step):
        seen = trained.seen[step]
        assert (kept.total[i], kept.saved[i], kept.backwards[i], kept.masked[i]) == seen["totals"]
        assert kept.skipped[i] == seen["skipped"]
        if step >= OPTIONS["warmup_steps"]:
            assert torch.equal(torch.from_numpy(kept.keep[i]), seen["keep"].float())
        else:
            assert (kept.keep[i] == 1.0).all(), "nothing is skipped while it warms up, whatever the policy says"
    assert kept.groups == trained.session.groups and kept.families == trained.session.families
    assert [kept.families[i] for i in kept.family] == [name.rpartition("[")[0] for name in kept.groups]
    assert (np.diff(kept.seconds) > 0).all() and kept.seconds[0] > 0
    assert kept.saved[-1] > 0 and kept.skipped.max() > 0 and 0 < kept.masked[-1] < kept.backwards[-1]
    assert (kept.descent[-1] > 0).all() and (kept.update_ratio[-1] > 0).all()
    assert (kept.flops > 0).all() and kept.flops.sum() == kept.total[-1] / 24


def test_a_pinned_group_is_kept_as_pinned():
    run = Run(tolerance=0.0)
    run.train(0, 1)
    run.session.pin({run.session.groups[0]: False})
    kept = run.train(1, 8).session.history
    assert (kept.keep[:, 0] == 0.0).all() and (kept.keep[:, 1:] == 1.0).all() and (kept.skipped == 1).all()


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.usefixtures("however_fast")
def test_a_resumed_run_has_one_history(late: bool, monkeypatch: pytest.MonkeyPatch):
    """And a bounded one: of 20 measurements no more than 8 are kept, the same as without the interruption."""
    monkeypatch.setattr(history, "POINTS", 8)
    first = Run().train(0, 22)
    state = first.session.state_dict()
    weights = [value.clone() for value in first.model.state_dict().values()], first.optimizers[0].state_dict()
    second = Run().train(90, 97 if late else 90)
    second.session.load_state_dict(state)
    second.model.load_state_dict(dict(zip(second.model.state_dict(), weights[0])))
    second.optimizers[0].load_state_dict(weights[1])
    assert second.session.history.step.tolist() == first.session.history.step.tolist()
    kept = second.train(22, 40).session.history
    whole = Run().train(0, 40)
    expected = whole.session.history
    assert kept.step.tolist() == expected.step.tolist() == list(range(8, 41, 8)) and kept.stride == 4
    for name in ("total", "saved", "backwards", "masked", "skipped", *history.BY_GROUP):
        assert np.array_equal(getattr(kept, name), getattr(expected, name), equal_nan=True), name
    assert (np.diff(kept.seconds) > 0).all()


def test_before_the_first_reading_there_is_nothing():
    run = Run()
    assert len(run.session.history.step) == 0 and run.session.about == {}
    kept = run.train(0, 1).session.history
    assert len(kept.step) == 0 and kept.keep.shape == (0, len(run.session.groups))
    about = run.session.about
    assert about["options"]["monitor_every"] == EVERY and about["graphs"] == 1
    assert about["parameters"]["0.weight"]["reason"] == "" and about["parameters"]["0.weight"]["flops"] > 0
    assert "one-dimensional" in about["parameters"]["0.bias"]["reason"]


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a name": ({"groups": "all"}, ["groups", "list of names", "'all'"]),
    "too few kinds": ({"kinds": []}, ["kinds", "2 names"]),
    "steps": ({"step": [1, 2]}, ["step", "int64 [measurements]", "[1, 2]"]),
    "steps that fall": ({"step": torch.tensor([4, 2])}, ["step", "rising", "[4, 2]"]),
    "another length": ({"total": torch.ones(3).double()}, ["total", "float64 [2]", "float64 [3]"]),
    "another type": ({"keep": torch.ones(2, 3)}, ["keep", "float32 [2, 4]", "float32 [2, 3]"]),
    "a family that is not there": ({"family": torch.tensor([0, 0, 1, 2])}, ["family", "from 0 to 1"]),
    "stride": ({"stride": 0}, ["stride", ">= 1", "0"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_history_is_one_clear_error(case: str):
    row, table = torch.zeros(2).double(), torch.zeros(2, 4)
    right = history.History.empty().to_dict() | dict.fromkeys(history.BY_STEP, row)
    right |= dict.fromkeys(history.BY_GROUP, table) | {"flops": torch.zeros(4).double()}
    right |= {"step": torch.tensor([2, 4]), "skipped": torch.tensor([0, 1]), "family": torch.tensor([0, 0, 1, 1])}
    right |= {"groups": list("abcd"), "families": ["f", "g"], "kinds": ["rows", "rows"]}
    check_history(right)
    spoilt, words = WRONG[case]
    with pytest.raises(ConvAwareError) as error:
        check_history({**right, **spoilt})
    assert all(word in str(error.value) for word in ["history", *words]), error.value
