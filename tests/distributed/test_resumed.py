"""A run that several ranks go on with, from a saved state, is the one that was not interrupted, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import OPTIONS, Mlp
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import cacompile

WIDTH = 24
STEPS = 12
"""Steps that are compared."""


class Run:
    """How one rank trains. how: "ddp", "zero1", "fsdp" or "tensor parallel"."""

    def __init__(self, how: str) -> None:
        torch.manual_seed(0)
        self.model, self.how = Mlp(WIDTH, 96), how
        self.run: Any = torch.compile(self.model, backend="convaware", options={**OPTIONS, "monitor_every": 4})
        if how == "fsdp":
            fully_shard(self.model)
        elif how == "tensor parallel":
            plan: dict[str, Any] = {"up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(self.model, init_device_mesh("cpu", (2,)), plan)
        else:
            self.run = DistributedDataParallel(self.run)
        params = self.model.parameters()
        self.optimizer: Any = optim.AdamW(params, lr=1e-3, foreach=False)
        if how == "zero1":
            self.optimizer = ZeroRedundancyOptimizer(self.model.parameters(), optim.AdamW, lr=1e-3, foreach=False)
        self.session = cacompile.StatefulSession(self.model)

    def train(self, rank: int, start: int, stop: int) -> list[Any]:
        """The mask and a sum of weights after each step; ranks that may have batches of other lengths have."""
        found = []
        for i in range(start, stop):
            rank = 0 if self.how == "tensor parallel" else rank
            length = (
                6 if self.how == "tensor parallel" else [3 + i % 4, 9 - i % 3][rank]
            )  # torch 2.13: no dynamic DTensors
            x = torch.randn(4, length, WIDTH, generator=torch.Generator().manual_seed(100 * i + rank))
            F.cross_entropy(self.run(x).flatten(0, 1), x.flatten(0, 1).argmax(-1)).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
            self.optimizer.step()
            self.optimizer.zero_grad()
            found.append(cacompile.session(self.model).mask.tolist())
        return found

    def states(self) -> tuple[Any, ...]:
        optimizer = self.optimizer.optim if self.how == "zero1" else self.optimizer
        return copy.deepcopy((self.model.state_dict(), optimizer.state_dict(), self.session.state_dict()))

    def load(self, states: tuple[Any, ...]) -> None:
        weights, optimizer, session = states
        self.model.load_state_dict(weights)
        (self.optimizer.optim if self.how == "zero1" else self.optimizer).load_state_dict(optimizer)
        self.session.load_state_dict(session)

    def weights(self) -> list[Tensor]:
        each = (param.detach() for param in self.model.parameters())
        return [(param.to_local() if hasattr(param, "to_local") else param).clone() for param in each]


def interrupted(rank: int, how: str, after: int) -> tuple[bool, bool, float]:
    """(are all masks as without, all weights, which share of blocks is skipped). after: steps by the interruption."""
    first = Run(how)
    first.train(rank, 0, after)
    states = first.states()
    masks = first.train(rank, after, after + STEPS)
    torch._dynamo.reset()
    second = Run(how)
    second.load(states)
    again = second.train(rank, after, after + STEPS)
    same = [torch.equal(a, b) for a, b in zip(first.weights(), second.weights())]
    off = [not on for mask in masks for on in mask]
    return masks == again, all(same), sum(off) / len(off)


@pytest.mark.parametrize(
    ("how", "after"),
    [
        ("ddp", 13),
        ("fsdp", 12),  # right after a reading
        *(pytest.param("ddp", after, marks=pytest.mark.slow) for after in (1, 12, 15)),
        *(pytest.param("fsdp", after, marks=pytest.mark.slow) for after in (13, 15)),
        pytest.param("zero1", 12, marks=pytest.mark.slow),
        pytest.param("tensor parallel", 12, marks=pytest.mark.slow),
        pytest.param("tensor parallel", 14, marks=pytest.mark.slow),
    ],
)
def test_as_if_nothing_had_been(ranks: Callable[..., list[Any]], how: str, after: int) -> None:
    for masks, weights, skipped in ranks(interrupted, how, after):
        assert masks and weights and skipped > 0.1
