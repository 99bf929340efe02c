"""A rank that runs out of memory within a backward pass, or whose loss is not a number: all ranks go on alike."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import OPTIONS, Mlp
from torch import Tensor, nn, optim
from torch import distributed as dist
from torch.distributed._composable.replicate import replicate
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import cacompile

WIDTH = 32
STEPS = 24
BAD = (7, 12, 13, 18)
"""Steps in which the second rank has an accident."""


class Fails(torch.autograd.Function):
    """Raises in its backward, if told so."""

    told = False

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if Fails.told:
            raise MemoryError
        return grad


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(WIDTH, 128), Mlp(WIDTH, 128)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[1](Fails.apply(self.blocks[0](x)))


Found = tuple[list[list[bool]], list[float], float]


def train(rank: int, wrap: str, accident: str) -> Found:
    """(the mask after each step, the weights, share of dW FLOPs that was skipped)."""
    model, run, scaler = Net(), None, torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=5)
    for block in model.blocks:
        block.compile(backend="convaware", options=OPTIONS)
        if wrap == "fsdp":
            fully_shard(block)
    if wrap == "ddp":
        run = DistributedDataParallel(model)
    else:
        fully_shard(model) if wrap == "fsdp" else replicate(model)
    optimizer, session, masks = optim.AdamW(model.parameters(), lr=1e-3), cacompile.session(model), []

    def loss_of(i: int) -> Tensor:
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * i + rank))
        return F.cross_entropy((run or model)(x), x.argmax(-1))

    for i in range(STEPS):
        bad = rank == 1 and i in BAD
        if accident == "no number":
            scaler.scale(loss_of(i) * (torch.nan if bad else 1.0)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        elif accident == "half a backward":  # of a batch that is not averaged yet
            Fails.told = bad
            assert run is not None
            try:
                with run.no_sync():
                    loss_of(i).backward()
            except MemoryError:
                pass
            Fails.told = False
            loss_of(1000 + i).backward()
            optimizer.step()
        else:  # "a batch left out", by all ranks
            loss, failed = loss_of(i), torch.tensor(float(bad))
            dist.all_reduce(failed)
            if not failed:
                loss.backward()
                optimizer.step()
            del loss
        optimizer.zero_grad()
        masks.append(session.mask.tolist())
    weights = [(param.full_tensor() if wrap == "fsdp" else param).detach() for param in model.parameters()]
    total, saved = session.flops
    return masks, torch.cat([weight.flatten() for weight in weights]).tolist(), saved / total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "accident"),
    [
        *(("ddp", accident) for accident in ("no number", "half a backward", "a batch left out")),
        *(("fsdp", accident) for accident in ("no number", "a batch left out")),
        ("replicate", "a batch left out"),
    ],
)
def test_all_ranks_go_on_alike(ranks: Callable[..., list[Any]], wrap: str, accident: str) -> None:
    first, second = ranks(train, wrap, accident)
    assert first[:2] == second[:2] and all(weight == weight for weight in first[1])
    assert min(first[2], second[2]) > 0.05


def leaves_out(rank: int, out: int, wrap: str) -> list[str]:
    """What is said where rank 1 leaves a step of its optimizer out; on all ranks."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cacompile").addHandler(handler)
    model = Net()
    wrapper = DistributedDataParallel(torch.compile(model, backend="convaware", options=OPTIONS))
    make = functools.partial(ZeroRedundancyOptimizer, optimizer_class=optim.AdamW) if wrap == "zero" else optim.AdamW
    params = list(wrapper.parameters())
    optimizers = [make(each, lr=1e-3) for each in ((params[:2], params[2:]) if wrap == "two" else (params,))]
    for i in range(STEPS):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(10 * i + rank))
        F.cross_entropy(wrapper(x), x.argmax(-1)).backward()
        for optimizer in optimizers if i != out or rank != 1 else ():
            optimizer.step()
        wrapper.zero_grad()
    logging.getLogger("cacompile").removeHandler(handler)
    return said


@pytest.mark.parametrize(("out", "wrap"), [(7, "ddp"), (7, "two"), (STEPS, "ddp")])
def test_a_step_that_one_rank_leaves_out_is_told_of(ranks: Callable[..., list[Any]], out: int, wrap: str) -> None:
    """Once, also by two optimizers."""
    found, other = ranks(leaves_out, out, wrap)
    assert not other and len(found) == (out < STEPS)
    assert all("ranks 0 and 1" in text and "the same steps" in text for text in found)


def test_weights_are_compared_once_owners_have_told_theirs(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(leaves_out, STEPS, "zero") == [[], []]
