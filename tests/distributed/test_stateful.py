"""`torch.distributed.checkpoint`: a session saved by two ranks goes on with one and with four."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import OPTIONS, Mlp, some_ranks
from torch import Tensor, nn, optim
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import cacompile

WIDTH = 24


def begin() -> tuple[Mlp, Callable[[Tensor], Tensor], optim.Optimizer]:
    """Sharded over the ranks that there are."""
    model = Mlp(WIDTH, 100)
    run = torch.compile(model, backend="convaware", options=OPTIONS)
    if dist.is_initialized():
        fully_shard(model)
    return model, run, optim.AdamW(model.parameters(), lr=1e-3)


def train(run: Callable[[Tensor], Tensor], optimizer: optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        x = torch.randn(4, WIDTH)
        F.cross_entropy(run(x), x.argmax(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()


def found(model: nn.Module) -> dict[str, Any]:
    session = cacompile.session(model)
    return {
        "step": session.step_count,
        "keep": session.keep.tolist(),
        "scores": session.scores.tolist(),
        "flops": session.flops,
        "measurements": session.history.to_dict()["step"].tolist(),
    }


def save(rank: int, folder: str) -> dict[str, Any]:
    model, run, optimizer = begin()
    train(run, optimizer, 13)
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states, "convaware": cacompile.StatefulSession(model)}
    dcp.save(state, checkpoint_id=folder)
    return found(model)


def load(rank: int, folder: str, again: str = "") -> tuple[dict[str, Any], float, list[bool]]:
    """What is there after loading, the share of dW FLOPs that is skipped since, the last mask.

    again: where it is saved after that.
    """
    model, run, optimizer = begin()
    weights, states = get_state_dict(model, optimizer)
    dcp.load(
        {"model": weights, "optimizer": states, "convaware": cacompile.StatefulSession(model)}, checkpoint_id=folder
    )
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    session = cacompile.session(model)
    before = session.flops
    x = torch.randn(4, WIDTH)
    run(x)  # groups are known once it has run
    there = found(model)
    train(run, optimizer, 13)
    total, saved = (now - then for now, then in zip(session.flops, before))
    if again:
        weights, states = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": states, "convaware": cacompile.StatefulSession(model)}
        dcp.save(state, checkpoint_id=again)
        there["after"] = found(model)
    return there, saved / total, session.mask.tolist()


@pytest.mark.usefixtures("however_fast")  # as on the other ranks
@pytest.mark.parametrize("count", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_session_is_loaded_by_other_numbers_of_ranks(
    ranks: Callable[..., list[Any]], count: int, tmp_path: Path
) -> None:
    saved, _ = ranks(save, str(tmp_path))
    assert saved["flops"][1] > 0.0
    if count == 1:
        results = [load(0, str(tmp_path))]
    else:
        with some_ranks(count) as run:
            results = run(load, str(tmp_path))
    for there, skipped, mask in results:
        assert there == saved and skipped > 0.05
        assert mask == results[0][2] and not all(mask)


@pytest.mark.slow
@pytest.mark.usefixtures("however_fast")
def test_from_two_ranks_to_one_and_back(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    ranks(save, str(tmp_path / "two"))
    (there, skipped, _) = load(0, str(tmp_path / "two"), str(tmp_path / "one"))
    assert skipped > 0.05
    first, second = ranks(load, str(tmp_path / "one"))
    assert first[0] == second[0] == there["after"] and first[2] == second[2]
    assert min(first[1], second[1]) > 0.05 and not all(first[2])
