"""Gradients are clipped by about the norm that they would have with nothing skipped."""

from __future__ import annotations

import copy
import logging
from typing import Any

import numpy as np
import pytest
import torch
from helpers import compile_all, mlp
from torch import nn, optim
from torch.nn.utils import clip_grad, clip_grad_norm_

import cacompile
from cacompile.hooks import clipping

pytestmark = pytest.mark.usefixtures("followed")

ON = np.array([True, False, False, True, False])
ORDERS = [1.0, 2.0, 3.5, torch.inf]


def get_total_norm(*args: Any, **kwargs: Any) -> torch.Tensor:
    return nn.utils.get_total_norm(*args, **kwargs)


def unfollowed(grads: list[torch.Tensor], order: float = 2.0) -> torch.Tensor:
    return nn.utils.get_total_norm.__wrapped__(grads, order)


def plain(grads: list[torch.Tensor], order: float = 2.0) -> torch.Tensor:
    return torch.linalg.vector_norm(torch.cat([grad.flatten() for grad in grads]), order)


def give(param: nn.Parameter, state: Any, rows: Any, fresh: torch.Tensor, on: np.ndarray) -> None:
    """A gradient as a masked backward leaves it."""
    state.skipped[:] = ~on
    param.grad = fresh.index_fill(state.partition.dim, rows(state, ~on), 0.0)


@pytest.mark.parametrize("optimizer_type", [optim.AdamW, optim.SGD])
def test_a_compiled_model_is_clipped_as_if_nothing_were_skipped(optimizer_type: Any):
    """Another half is skipped in each of 30 steps; the true norm is that of eager gradients at the same weights."""
    model = mlp()
    compiled = compile_all(model, "convaware")
    replacement = copy.deepcopy(model)
    optimizer = optimizer_type(model.parameters(), lr=1e-2)
    target = torch.randn(32, 32)
    x = torch.randn(16, 32)
    nn.functional.mse_loss(compiled(x), x @ target).backward()
    ours, seen = [], []
    for i in range(30):
        optimizer.zero_grad()
        cacompile.session(model).pin(keep=0.5, seed=i)
        x = torch.randn(16, 32) * (3.0 if i % 10 == 9 else 1.0)  # now and then all gradients are great
        replacement.load_state_dict(model.state_dict())
        replacement.zero_grad()
        nn.functional.mse_loss(replacement(x), x @ target).backward()
        true = plain([param.grad for param in replacement.parameters()])
        nn.functional.mse_loss(compiled(x), x @ target).backward()
        before = [param.grad.clone() for param in model.parameters()]
        total = clip_grad_norm_(model.parameters(), 0.5 * float(true))
        for param, grad in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(param.grad, grad * (0.5 * true / total))
        ours.append(float(total / true))
        seen.append(float(plain(before) / true))
        optimizer.step()
    assert np.mean(seen) < 0.8, "or there is nothing to correct"
    assert abs(np.mean(ours) - 1.0) < 0.02 and np.std(ours) < 0.06 and np.abs(np.array(ours) - 1.0).max() < 0.2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", [(10, 4), (9, 4), (9,)], ids=str)
@pytest.mark.parametrize("foreach", [None, False, True])
def test_norm_of_gradients_that_stay_as_they_were(order: float, shape: Any, foreach: bool | None, make: Any, rows: Any):
    """Once each group has been seen, the norm is exact, whatever is common to all has become."""
    param, state = make(*shape)
    other = nn.Parameter(torch.randn(3))
    other.grad = torch.randn(3)
    fresh = torch.randn(shape)
    for on in (ON, ~ON):
        give(param, state, rows, fresh, on)
        get_total_norm([param.grad, other.grad], order, foreach=foreach)
    give(param, state, rows, fresh * 3.0, ON)
    grads = [param.grad, other.grad]
    total = get_total_norm(grads, order, foreach=foreach)
    torch.testing.assert_close(total, plain([fresh * 3.0, other.grad], order))
    expected = other.grad * (0.1 / total)
    clip_grad_norm_([param, other], 0.1, order, foreach=foreach)
    torch.testing.assert_close(other.grad, expected, atol=1e-6, rtol=1e-4)
    assert not param.grad[rows(state, ~ON)].any()


@pytest.mark.parametrize("dim", [0, 1])
def test_a_group_that_is_not_known_has_what_the_others_have(dim: int, make: Any, rows: Any):
    param, state = make(9, 9, dim=dim)
    fresh = torch.ones(9, 9)
    give(param, state, rows, fresh, ON)
    torch.testing.assert_close(get_total_norm([param.grad]), torch.tensor(9.0))
    torch.testing.assert_close(get_total_norm(param.grad, torch.inf), torch.tensor(1.0))


def test_nothing_is_known_of_what_was_never_computed(make: Any, rows: Any):
    (param, state), (other, _) = make(9, 4, name="a"), make(9, 4, name="b")
    give(param, state, rows, torch.ones(9, 4), np.zeros(5, bool))
    other.grad = torch.ones(9, 4)
    assert get_total_norm([param.grad, other.grad]) == 6.0


def test_what_is_computed_of_a_skipped_slice_is_not_counted_twice(make: Any, rows: Any):
    """As the embedding's share of a tied weight is."""
    param, state = make(9, 4)
    fresh = torch.randn(9, 4)
    for step, on in enumerate([ON, ~ON, ON]):
        give(param, state, rows, fresh, on)
        if step == 2:
            param.grad[rows(state, ~ON)] = 0.5 * fresh[rows(state, ~ON)]
        total = get_total_norm([param.grad])
    torch.testing.assert_close(total, plain([fresh]))


def test_the_norm_after_clipping_is_as_clipped_and_leaves_no_trace(make: Any, rows: Any):
    param, state = make(9, 4)
    give(param, state, rows, torch.ones(9, 4), ON)
    for _ in range(3):
        clip_grad_norm_([param], 0.5)
        torch.testing.assert_close(get_total_norm([param.grad]), torch.tensor(0.5), rtol=1e-4, atol=0.0)
    give(param, state, rows, torch.ones(9, 4), ~ON)
    torch.testing.assert_close(get_total_norm([param.grad]), torch.tensor(6.0))


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_an_overflow_is_seen_and_not_remembered(bad: float, make: Any, rows: Any):
    param, state = make(9, 4)
    fresh = torch.ones(9, 4)
    for on in (ON, ~ON):
        give(param, state, rows, fresh, on)
        get_total_norm([param.grad])
    give(param, state, rows, fresh, ON)
    param.grad[0, 0] = bad
    with pytest.raises(RuntimeError, match="non-finite"):
        clip_grad_norm_([param], 1.0, error_if_nonfinite=True)
    np.testing.assert_equal(float(get_total_norm([param.grad])), bad)
    give(param, state, rows, fresh, ~ON)
    torch.testing.assert_close(get_total_norm([param.grad]), torch.tensor(6.0))


@pytest.mark.parametrize("case", ["nothing skipped", "others", "sparse", "order", "strange", "not given"])
def test_else_it_is_the_very_same_call(case: str, make: Any, rows: Any, monkeypatch: pytest.MonkeyPatch):
    param, state = make(9, 4)
    other = nn.Parameter(torch.randn(5))
    other.grad = torch.randn(5)
    give(param, state, rows, torch.randn(9, 4), np.ones(5, bool) if case == "nothing skipped" else ON)
    if case == "strange":
        param.grad = param.grad.as_subclass(type("Strange", (torch.Tensor,), {}))
    elif case == "sparse":
        param.grad = param.grad.to_sparse()
    elif case == "not given":
        param.grad = None
    params = [other] if case == "others" else [param, other]
    grads = [p.grad for p in params if p.grad is not None]
    order = 0.0 if case == "order" else 2.0
    if case == "sparse":
        assert clipping.missing_norm(grads, order) is None
        return
    expected = unfollowed(grads, order)
    assert torch.equal(get_total_norm(grads, order), expected)
    assert torch.equal(get_total_norm(iter(grads), order), expected)
    if case in ("nothing skipped", "others", "not given"):
        monkeypatch.setattr(clipping, "_missing_on", None)
        assert torch.equal(clip_grad_norm_(iter(params), 1e-3), expected)


def test_what_cannot_be_judged_is_said_once(
    make: Any, rows: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    param, state = make(9, 4)
    give(param, state, rows, torch.randn(9, 4), ON)
    monkeypatch.setattr(clipping, "_norms", None)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(get_total_norm([param.grad]), unfollowed([param.grad]))
    assert sum("without what is skipped" in entry.getMessage() for entry in caplog.records) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_norm_has_the_dtype_that_torch_gives_it(dtype: torch.dtype, make: Any, rows: Any):
    param, state = make(9, 4, dtype=dtype)
    give(param, state, rows, torch.ones(9, 4, dtype=dtype), ON)
    total = get_total_norm([param.grad])
    assert total.dtype == dtype and float(total) == pytest.approx(6.0, rel=0.01)


def test_early_imports_and_compiled_calls_are_served():
    clipping.follow_clipping()
    assert clip_grad_norm_ is nn.utils.clip_grad_norm_, "what others may have imported stays in its place"
    assert clip_grad._get_total_norm is nn.utils.get_total_norm
    param = nn.Parameter(torch.randn(4))
    param.grad = torch.randn(4)
    expected = plain([param.grad])
    total = torch.compile(lambda: clip_grad_norm_([param], 0.1), backend="eager", fullgraph=True)()
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(plain([param.grad]), torch.tensor(0.1), rtol=1e-4, atol=0.0)


def test_a_torch_that_looks_its_norm_up_elsewhere(make: Any, rows: Any, monkeypatch: pytest.MonkeyPatch):
    def own(parameters: Any, max_norm: float) -> None:
        raise AssertionError

    for module, name, value in (
        (nn.utils, "get_total_norm", nn.utils.get_total_norm.__wrapped__),
        (nn.utils, "clip_grad_norm_", own),
        (clip_grad, "clip_grad_norm_", own),
        (clip_grad, "_get_total_norm", None),
    ):
        monkeypatch.setattr(module, name, value)
    clipping.follow_clipping.__wrapped__()
    assert clip_grad._get_total_norm is None
    param, state = make(9, 4)
    give(param, state, rows, torch.ones(9, 4), ON)
    assert float(nn.utils.clip_grad_norm_(param, 3.0)) == pytest.approx(6.0)
    torch.testing.assert_close(param.grad[0], torch.full((4,), 0.5))
