"""All parameters in one launch: the same estimates and scores as one parameter after the other.

By Triton's interpreter, in a process of its own (see tests/interpreter.py), or on a GPU.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn, optim

from cacompile.config import Config
from cacompile.controller.controller import Controller
from cacompile.controller.estimate import fill, fill_together, weights
from cacompile.controller.monitor import measure, measure_together, settings_by_param
from cacompile.kernels.segments import Tables
from cacompile.layout import Partition
from cacompile.state.params import ParamState
from cacompile.state.registry import registry

pytest.importorskip("triton", exc_type=ImportError)

SHAPES = (((9, 6), 0), ((6, 9), 1), ((16, 8), 0), ((4, 5, 3, 3), 0), ((4, 6, 1, 1), 1))
OPTIMIZERS: tuple[tuple[Any, dict[str, Any]], ...] = (
    (optim.AdamW, {}),
    (optim.Adam, {"weight_decay": 0.1, "maximize": True}),
    (optim.Adam, {"weight_decay": 0.1, "betas": (0.0, 0.5), "eps": 1e-3}),
    (optim.Adam, {"lr": torch.tensor(0.01), "foreach": False}),
    (optim.Adamax, {"weight_decay": 0.1}),
    (optim.SGD, {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
    (optim.SGD, {}),
    (optim.RMSprop, {"momentum": 0.5}),
)


def made(device: str, **options: object) -> list[tuple[nn.Parameter, ParamState]]:
    """Parameters of many kinds: the last lies in memory as its gradients do not, the one before is of another dtype."""
    torch.manual_seed(0)
    tensors = [(torch.randn(shape), dim) for shape, dim in SHAPES]
    tensors.append((torch.randn(4, 6, 2, 2).to(memory_format=torch.channels_last), 0))
    tensors += [(torch.randn(6, 4).bfloat16(), 0), (torch.randn(6, 4), 0)]
    pairs = []
    for i, (tensor, dim) in enumerate(tensors):
        param = nn.Parameter(tensor.to(device))
        state = registry.track(param, f"w{i}")
        assert state.part(Partition(dim, 2, tensor.shape[dim]), Config(warmup_steps=0, **options), f"w{i}")
        state.skipped[:] = np.arange(state.blocks) % 2 == i % 2
        state.age[:] = np.arange(state.blocks) % 4  # of those that are not skipped, some never were
        pairs.append((param, state))
    return pairs


def give_gradients(pairs: list[tuple[nn.Parameter, ParamState]]) -> None:
    for param, _ in pairs:
        param.grad = torch.randn_like(param)
    pairs[-1][0].grad = torch.randn(4, 6, device=param.device).t()


def trained(device: str, kind: Any, settings: dict[str, Any], **options: object) -> tuple[Any, optim.Optimizer]:
    pairs = made(device, **options)
    optimizer = kind([param for param, _ in pairs], **{"lr": 0.01, **settings})
    for _ in range(3):
        give_gradients(pairs)
        optimizer.step()
    give_gradients(pairs)
    return pairs, optimizer


def wanted(states: list[ParamState]) -> dict[ParamState, np.ndarray]:
    return {state: weights(state.skipped, state.age) for state in states}


def check_fill(pairs: list[tuple[nn.Parameter, ParamState]], optimizer: optim.Optimizer, left: list[int]) -> None:
    """`left`: which of the parameters are left to be filled one by one."""
    settings, states = settings_by_param(optimizer), [state for _, state in pairs]
    before = [None if param.grad is None else param.grad.clone() for param, _ in pairs]
    for (param, _), (state, of_blocks) in zip(pairs, wanted(states).items(), strict=True):
        fill(optimizer, settings[id(param)], state, of_blocks)
    expected = [param.grad for param, _ in pairs]
    for (param, _), grad in zip(pairs, before, strict=True):
        param.grad = None if grad is None else grad.clone()
    found = fill_together(states, wanted(states), optimizer, settings, Tables())
    assert list(found) == [states[i] for i in left]
    for i, (param, _) in enumerate(pairs):
        if i not in left and param.grad is not None:
            # torch rounds between operations, and the interpreter cuts bfloat16 off
            rtol, atol = (1e-6, 1e-7) if param.dtype == torch.float32 else (2**-6, 4e-3)
            torch.testing.assert_close(param.grad, expected[i], rtol=rtol, atol=atol)
            assert not torch.equal(param.grad, before[i])
        elif param.grad is not None:
            assert torch.equal(param.grad, before[i]), "left is left alone"


def fill_case(device: str, which: int) -> None:
    pairs, optimizer = trained(device, *OPTIMIZERS[which])
    every = list(range(len(pairs)))
    check_fill(pairs, optimizer, every[-1:])


@pytest.mark.parametrize("which", range(len(OPTIMIZERS)))
def test_estimates(launch: Any, which: int):
    launch(fill_case, which)


def odd_fill_case(device: str) -> None:
    pairs, optimizer = trained(device, optim.Adam, {"weight_decay": 0.1})
    last = len(pairs) - 1
    pairs[1][0].grad = None
    optimizer.state[pairs[2][0]]["exp_avg"] = torch.zeros(3)  # zeros, then
    del optimizer.state[pairs[3][0]]
    optimizer.state[pairs[4][0]]["exp_avg"] = optimizer.state[pairs[4][0]]["exp_avg"].double()
    check_fill(pairs, optimizer, [4, last])
    give_gradients(pairs)
    optimizer.grad_scale = torch.tensor(8.0, device=device)
    pairs[0][1].skipped[:] = True
    check_fill(pairs, optimizer, [4, last])
    for param, _ in pairs:
        param.grad = None
    check_fill(pairs, optimizer, [4])
    pairs, optimizer = trained(device, optim.Adam, {}, estimate="zeros")
    check_fill(pairs, optimizer, [last])
    assert not pairs[0][0].grad[0:2].any() and pairs[0][0].grad[2:4].all(), "the first group is skipped"


def test_estimates_of_what_is_not_as_usual(launch: Any):
    launch(odd_fill_case)


def lent_case(device: str) -> None:
    """What has lent its moment is not written, and keeps its place: tables are not made anew as turns change."""
    pairs, optimizer = trained(device, optim.AdamW, {})
    tables, settings, states = Tables(), settings_by_param(optimizer), [state for _, state in pairs[:-1]]
    kept = []
    for lent in (0, 1, 4):
        give_gradients(pairs)
        before = [param.grad.clone() for param, _ in pairs]
        rest = wanted([state for i, state in enumerate(states) if i != lent])
        assert fill_together(states, rest, optimizer, settings, tables) == {}
        same = [torch.equal(param.grad, grad) for (param, _), grad in zip(pairs[:-1], before)]
        assert same == [i == lent for i in range(len(same))]
        kept.append(list(tables._known))
    assert kept[0] == kept[1] == kept[2]


def test_tables_stay_while_turns_change(launch: Any):
    launch(lent_case)


def read_case(device: str, which: int) -> None:
    pairs, optimizer = trained(device, *OPTIMIZERS[which])
    pairs[1][0].grad = None
    for param, _ in pairs[2:4]:
        if "step" in optimizer.state[param]:
            optimizer.state[param]["step"] = 3.0  # known to the host
    last, every = len(pairs) - 1, list(range(len(pairs)))
    # Adam's states lie as the parameter does, SGD's as the first gradient did; no kernel knows Adamax and RMSprop
    check_read(pairs, optimizer, which != 6, {4: every, 5: [last], 6: [1, last], 7: every}.get(which, []))


def check_read(
    pairs: list[tuple[nn.Parameter, ParamState]], optimizer: optim.Optimizer | None, averaged: bool, left: list[int]
) -> None:
    states = [state for _, state in pairs]
    exact = {id(state): scores for state, scores in measure(states, optimizer, {})}
    tables = Tables()
    found, found_left = measure_together(states, optimizer, tables, {})
    assert found_left == [states[i] for i in left]
    assert sorted(map(id, found_left + [state for state, _ in found])) == sorted(map(id, states))
    for state, scores in found:
        tolerance = 1e-5 if state.param.dtype == torch.float32 else 0.05  # torch rounds between operations
        np.testing.assert_allclose(scores.values()[0], exact[id(state)].values()[0], rtol=tolerance)
        assert (scores.sampled is None) == averaged
        assert averaged or (scores.sampled == exact[id(state)].sampled).all()


@pytest.mark.parametrize("which", range(len(OPTIMIZERS)))
def test_scores(launch: Any, which: int):
    launch(read_case, which)


def odd_read_case(device: str) -> None:
    pairs, optimizer = trained(device, optim.Adam, {})
    check_read(pairs, optimizer, averaged=True, left=[])
    states, state = [state for _, state in pairs], [optimizer.state[param] for param, _ in pairs]
    state[0]["step"] = "third"
    state[1]["step"] = torch.tensor(3.0, dtype=torch.float64, device=device)
    state[2]["exp_avg_sq"] = state[2]["exp_avg_sq"].double()
    optimizer.param_groups[0]["betas"] = (0.9, torch.tensor(0.999))
    assert measure_together(states, optimizer, Tables(), {})[1] == states
    optimizer.param_groups[0]["betas"] = (0.9, 0.999)
    left = measure_together(states, optimizer, Tables(), {})[1]
    assert left == states[:3]
    for param, _ in pairs:
        param.grad = None
    pairs[0][0].grad = torch.randn_like(pairs[0][0])
    ((state, scores),), left = measure_together(states, None, Tables(), {})
    assert state is states[0] and left == states[1:]
    expected = pairs[0][0].grad.square().view(-1).split(12)
    np.testing.assert_allclose(scores.values()[0], [float(part.sum()) for part in expected], rtol=1e-5)


def test_scores_of_what_is_not_as_usual(launch: Any):
    launch(odd_read_case)


def scope_case(device: str) -> None:
    """Two controllers step alike, one of them as on a GPU."""
    runs = []
    for near in (False, True):
        pairs, optimizer = trained(device, optim.AdamW, {}, monitor_every=2, tolerance=0.5)
        controller = Controller([state for _, state in pairs])
        controller._by_device = lambda params, near=near: (list(params), []) if near else ([], list(params))
        launches = count_launches() if near else []
        for _ in range(4):
            give_gradients(pairs)
            controller.fill(optimizer)
            optimizer.step()
            controller.advance(optimizer)
            for state in controller.params:
                state.skipped[:] = ~state.on
        runs.append(([param.detach().float() for param, _ in pairs], controller.column("score").copy(), launches))
    for a, b in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4)
    np.testing.assert_allclose(runs[0][1], runs[1][1], rtol=0.05)
    assert runs[1][2].count("sums") == 2 * 2, "a launch a dtype, in two of the steps"
    assert 0 < runs[1][2].count("fill") <= 4 * 2


def count_launches() -> list[str]:
    from cacompile.kernels import triton_segments

    counted: list[str] = []
    for name, short in (("group_sums", "sums"), ("fill_estimates", "fill")):
        real = getattr(triton_segments, name)

        def counting(*args: Any, real: Any = real, short: str = short) -> Any:
            counted.append(short)
            return real(*args)

        setattr(triton_segments, name, counting)
    return counted


def test_a_scope_steps_as_one_by_one(launch: Any):
    launch(scope_case)


def test_a_step_that_is_captured_leaves_the_mask_as_it_is(
    make: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """What a CUDA graph holds is filled one by one: no table, no copy from the host."""
    param, state = make(8, 2, monitor_every=1)
    optimizer = optim.AdamW([param])
    optimizer.state[param]["exp_avg"] = torch.full_like(param, 0.1)
    controller = Controller([state])
    on = np.array([True, False, True, False])
    state.table.set_on(state.rows, on)
    state.column("keep")[:] = 0.0
    state.skipped[:] = ~on
    state.age[:] = 3  # the steps that are replayed have not all been without it
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        patch.setattr(controller, "_by_device", None)
        for _ in range(2):
            param.grad = torch.ones_like(param)
            controller.fill(optimizer)
            assert param.grad[:, 0].tolist() == [1.0, 1.0, *optimizer.state[param]["exp_avg"][:2, 0].tolist()] * 2
            controller.advance(optimizer)
        assert (state.on == on).all() and (state.skipped == ~on).all() and state.step == 0
    assert sum("CUDA graph" in entry.getMessage() for entry in caplog.records) == 1
    with caplog.at_level(logging.WARNING):
        controller.advance(optimizer)
    assert state.step == 1 and not state.skipped.any()
