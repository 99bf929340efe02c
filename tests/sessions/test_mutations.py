"""Whatever a saved state or options are turned into: one error that changes nothing, or training goes on."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats import Run

import cacompile
from cacompile.config import Config
from cacompile.errors import ConvAwareError, shown

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 7, 2**31, 2**53, 2**63 - 1, 2**63, 2**70, 10**25, 10**400, 10**5000, 0.0, -0.0, 0.3,
    -0.5, 1e308, math.inf, -math.inf, math.nan, 1j, "", "0", "0.weight", b"", b"ab", [], [1, 2], (), (None, 0.5, 0),
    (True,) * 8, {}, {"a": 1}, {1: 2}, set(), object, np.float64(0.5), np.int64(3), np.bool_(True), np.ones(8),
    torch.ones(8), torch.zeros(0), torch.arange(8), torch.ones(2, 8).double(), torch.tensor(1), torch.ones(8).bool(),
    torch.ones(8, device="meta"), torch.ones(8).to_sparse(),
]  # fmt: skip
DTYPES = [torch.bool, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32, torch.float64, torch.cfloat]
NUMBERS = [0, 1, -1, -5, 2**31, 2**61, 2**63 - 1, -(2**63), 0.5, 1.5, 1e308, math.inf, -math.inf, math.nan]

MANY = settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def same(a: Any, b: Any) -> bool:
    """Equal states, NaN and all."""
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
    return repr(a) == repr(b)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something is that can be turned into something else."""
    found = [path] if path else []
    if isinstance(value, (Mapping, list, tuple)):
        keys = value if isinstance(value, Mapping) else range(len(value))
        found += [each for key in keys for each in paths(value[key], (*path, key))]
    return found


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy with something else in one place."""
    if not path:
        return new
    key, *rest = path
    if isinstance(value, Mapping):
        return {**value, key: put(value[key], tuple(rest), new)}
    return type(value)(put(each, tuple(rest), new) if i == key else each for i, each in enumerate(value))


def without(value: Any, path: tuple[Any, ...]) -> Any:
    *where, last = path
    around = at(value, tuple(where))
    if isinstance(around, Mapping):
        return put(value, tuple(where), {key: each for key, each in around.items() if key != last})
    return put(value, tuple(where), type(around)(each for i, each in enumerate(around) if i != last))


def added(draw: st.DrawFn, value: Any) -> Any:
    key = draw(st.sampled_from(["more", "0.weight", "keep", "", 3, None, ("a",)]))
    if isinstance(value, Mapping):
        return {**value, key: draw(st.sampled_from(VALUES))}
    return [*value, draw(st.sampled_from(VALUES))] if isinstance(value, (list, tuple)) else value


def changed_tensor(draw: st.DrawFn, value: torch.Tensor) -> torch.Tensor:
    how = draw(st.sampled_from(["dtype", "shape", "entry", "all", "grad"]))
    if how == "dtype":
        return value.to(draw(st.sampled_from(DTYPES)))
    if how == "shape":
        return draw(st.sampled_from([value[:0], value[None], value.reshape(-1), torch.cat([value, value])]))
    number = draw(st.sampled_from(NUMBERS))
    if how == "grad":
        return value.clone().requires_grad_() if value.is_floating_point() else value[None]
    whole = value.dtype in (torch.bool, torch.int64)
    number = number if not whole or (isinstance(number, int) and value.dtype != torch.bool) else int(number == 1)
    value, number = value.clone(), torch.tensor(number).to(value.dtype)
    if how == "all" or not value.numel():
        return value.copy_(number)
    value.view(-1)[draw(st.integers(0, value.numel() - 1))] = number
    return value


@st.composite
def mutations(draw: st.DrawFn, state: dict[str, Any]) -> Any:
    """The state with one to three things in it turned into something else."""
    state = {**state, "format": draw(st.sampled_from([state["format"]] * 9 + VALUES[:12] + [4, 5]))}
    for _ in range(draw(st.integers(1, 3))):
        found = paths(state)
        # evenly over sections of the state, not over their sizes
        kinds = sorted({str(path[:2]) for path in found})
        kind = draw(st.sampled_from(kinds)) if kinds else ""
        path = draw(st.sampled_from([each for each in found if str(each[:2]) == kind] or [()]))
        how = draw(st.sampled_from(["drop", "add", "value", "tensor", "tensor", "number"]))
        value = at(state, path)
        if how == "drop" and path:
            state = without(state, path)
        elif how == "add":
            state = put(state, path, added(draw, value))
        elif isinstance(value, torch.Tensor) and how in ("tensor", "number"):
            strided = value.layout == torch.strided and value.device.type == "cpu"
            state = put(state, path, changed_tensor(draw, value) if strided and value.dim() else 3)
        elif isinstance(value, (int, float)) and how == "number":
            state = put(state, path, draw(st.sampled_from(NUMBERS)))
        else:
            state = put(state, path, draw(st.sampled_from(VALUES)))
    return state


@pytest.fixture(scope="module")
def trained() -> tuple[Run, tuple[Any, ...]]:
    """A run in the middle, some of it pinned, and its states there."""
    torch._dynamo.reset()
    run = Run()
    run.train(0, 14)
    return run, run.states()


@pytest.mark.slow
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("early", [False, True])
def test_a_mutated_state(trained: tuple[Run, tuple[Any, ...]], pinned: bool, early: bool):
    run, states = trained
    run.load(states)
    if pinned:
        run.session.pin({run.session.groups[0]: False, "2.bias": False})
        states = run.states()
    accepted = []

    @MANY
    @given(st.data())
    def check(data: st.DataObject) -> None:
        mutated = data.draw(mutations(copy.deepcopy(states[2])))
        used = Run() if early else run  # compiled anew by the first step only
        used.load(copy.deepcopy(states))
        before = used.states()
        try:
            used.session.load_state_dict(mutated)
        except ConvAwareError as error:
            assert len(str(error)) < 2000
            assert same(used.session.state_dict(), before[2])
            return
        accepted.append(mutated)
        used.train(14, 17)
        assert all(param.isfinite().all() for param in used.model.parameters())
        used.session.report("-")
        used.session.load_state_dict(used.session.state_dict())

    check()
    assert len(accepted) > 5


OPTIONS = st.dictionaries(
    st.sampled_from([*Config.__dataclass_fields__, "toleranse", "max_autotune", "epilogue-fusion", 3, None, ""]),
    st.one_of(
        st.sampled_from(VALUES), st.sampled_from(NUMBERS), st.integers(), st.floats(),
        st.sampled_from(["aot_eager", "momentum", "zeros"]), st.integers(0, 40),
    ),
    max_size=4,
)  # fmt: skip


@pytest.mark.slow
def test_mutated_options(caplog: pytest.LogCaptureFixture):
    accepted = []

    @MANY
    @given(OPTIONS)
    def check(options: dict[Any, Any]) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Linear(32, 8))
        optimizer = torch.optim.AdamW(model.parameters())
        options = {"inner": "aot_eager", **options}
        if callable(options["inner"]):
            return  # any compiler is taken at its word
        run = torch.compile(model, backend="convaware", options=options)
        for step in range(3):
            try:
                loss = run(torch.randn(4, 8)).square().mean()
            except ConvAwareError as error:
                assert step == 0 and len(str(error)) < 2000
                with pytest.raises(ConvAwareError):
                    cacompile.explain(model, torch.randn(4, 8), options=options)
                return
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        accepted.append(options)
        assert all(param.isfinite().all() for param in model.parameters())
        cacompile.session(model).load_state_dict(cacompile.session(model).state_dict())
        assert "Traceback" not in caplog.text

    check()
    assert len(accepted) > 5


@pytest.mark.parametrize(
    "value", [value for value in VALUES if value is not None and not isinstance(value, dict)], ids=shown
)
def test_options_that_are_no_dict(value: Any):
    with pytest.raises(ConvAwareError, match="options must be a dict of names and values, got "):
        cacompile.explain(torch.nn.Linear(8, 8), torch.ones(2, 8), options=value)
