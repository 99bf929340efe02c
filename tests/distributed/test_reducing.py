"""What all ranks skip or have frozen is not sent, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import OPTIONS, apart
from torch import Tensor, nn, optim
from torch.distributed.algorithms.join import Join
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import cacompile
from cacompile.errors import ConvAwareError

WIDTH = 32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down = (nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(F.gelu(self.first(x)))))


def train(
    rank: int,
    less: bool,
    *,
    freeze: tuple[str, ...] = (),
    join: bool = False,
    view: bool = False,
    every: int = 1,
    clip: float = 0.0,
) -> tuple[list[float], float, float, float]:
    """(weights, how far apart the ranks are, share of bytes sent since step 12, share of the gradients that is on)."""
    model = Net()
    run = torch.compile(model, backend="convaware", options=OPTIONS)
    wrapper = DistributedDataParallel(run, gradient_as_bucket_view=view)
    traffic = cacompile.reduce_less(wrapper) if less else None
    optimizer = optim.SGD(wrapper.parameters(), lr=1e-2, momentum=0.9)
    session, before, on = cacompile.session(model), (0, 0), []

    def step(i: int) -> None:
        for micro in range(every):
            x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * i + 10 * micro + rank))
            wrapper.require_backward_grad_sync = micro + 1 == every
            F.cross_entropy(wrapper(x), x.argmax(-1)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    with Join([wrapper], enable=join):
        for i in range(24 - 6 * rank * join):
            if i == 12:
                if freeze:
                    session.freeze(*freeze)
                before = (traffic.sent, traffic.dense) if traffic else before
            if i > 11:
                states = session.params.values()
                kept = sum((p.param[0].numel() * 16 if p.partition.dim == 0 else p.shape[0] * 16) * int(p.on.sum())
                           if p.blocks else p.param.numel() for p in states)  # fmt: skip
                on.append(kept / sum(param.numel() for param in model.parameters()))
            step(i)
    sent = (traffic.sent - before[0]) / (traffic.dense - before[1]) if traffic else 1.0
    weights = torch.cat([param.detach().flatten() for param in model.parameters()]).tolist()
    return weights, apart(model), sent, sum(on) / len(on)


def run_train(rank: int, less: bool, how: dict[str, Any]) -> Any:
    return train(rank, less, **how)


@pytest.mark.parametrize(
    "how",
    [{}, {"view": True, "every": 2, "clip": 0.05}, {"freeze": ("first.*", "up.neurons[32:48]")}],
    ids=["plain", "accumulated and clipped", "frozen"],
)
def test_less_is_sent_and_nothing_changes(ranks: Callable[..., list[Any]], how: dict[str, Any]) -> None:
    dense, less = ranks(run_train, False, how), ranks(run_train, True, how)
    assert [each[:2] for each in dense] == [each[:2] for each in less] and less[0][1] == 0.0
    sent, on = less[0][2:]
    assert sent < 0.9
    if not how.get("freeze"):
        assert sent == pytest.approx(on, abs=0.02)


class Stack(nn.Module):
    """Blocks that are compiled one by one, of which the lower ones are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Net() for _ in range(3))
        for block in self.blocks:
            block.compile(backend="convaware", options=OPTIONS)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def frozen_below(rank: int) -> tuple[float, list[bool]]:
    """How far apart the ranks are, and of each block whether it has stayed."""
    model = Stack()
    wrapper = DistributedDataParallel(model)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    before: list[Tensor] = []
    for i in range(12):
        if i == 6:
            cacompile.session(model).freeze("blocks.[01].*")
            before = [block.up.weight.detach().clone() for block in model.blocks]
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * i + rank))
        F.cross_entropy(wrapper(x), x.argmax(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return apart(model), [torch.equal(block.up.weight, was) for block, was in zip(model.blocks, before)]


def test_blocks_below_are_frozen_and_nobody_waits_for_them(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(frozen_below) == [(0.0, [True, True, False])] * 2


@pytest.mark.slow
def test_under_join_everything_is_sent(ranks: Callable[..., list[Any]]) -> None:
    found = ranks(run_train, True, {"join": True})
    assert found[0][2] == 1.0 and found[0][1] == 0.0


def test_only_for_data_parallel_models() -> None:
    with pytest.raises(ConvAwareError, match="must be a DistributedDataParallel, got Linear"):
        cacompile.reduce_less(nn.Linear(2, 2))
