"""What all ranks skip or have frozen is not sent, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import OPTIONS, Mlp, apart
from torch import Tensor, nn, optim
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import cacompile
from cacompile.errors import ConvAwareError
from cacompile.hooks.traffic import Traffic

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
    transposed: bool = False,
) -> tuple[list[float], float, float, float]:
    """(weights, how far apart the ranks are, share of bytes sent since step 12, share of the gradients that is on)."""
    model = Net()
    if transposed:
        model.up.weight = nn.Parameter(model.up.weight.detach().t().contiguous().t())
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
    [{}, {"view": True, "every": 2, "clip": 0.05}, {"freeze": ("first.*", "up.neurons[32:48]")}, {"transposed": True}],
    ids=["plain", "accumulated and clipped", "frozen", "not contiguous"],
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


def sharded(rank: int, less: bool, how: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(weights in the end, share of the bytes that each step has sent)."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Mlp(33, 100) for _ in range(2)), nn.LayerNorm(33))
    settings: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(how.get("dtype"), how.get("reduce"))}
    if how.get("columns"):
        model = nn.Sequential(*(Mlp(32, 96) for _ in range(2)), nn.LayerNorm(32))
        settings["shard_placement_fn"] = lambda param: Shard(param.ndim - 1)
    for block in model[:2]:
        block.compile(backend="convaware", options=OPTIONS)
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    traffic = cacompile.reduce_less(model) if less else Traffic()
    session, optimizer = cacompile.session(model), optim.AdamW(model.parameters(), lr=1e-3)
    every, always, shares = how.get("every", 1), how.get("always", False), []
    for i in range(16):
        if i == 8 and "freeze" in how:
            session.freeze(*how["freeze"])
        before = traffic.sent, traffic.dense
        for micro in range(every):
            x = torch.randn(
                4, *model[2].weight.shape, generator=torch.Generator().manual_seed(10 * i + 2 * micro + rank)
            )
            model.set_requires_gradient_sync(always or micro + 1 == every)
            F.cross_entropy(model(x), x.argmax(-1)).backward()
        if "clip" in how:
            nn.utils.clip_grad_norm_(model.parameters(), how["clip"])
        optimizer.step()
        optimizer.zero_grad()
        shares.append((traffic.sent - before[0]) / max(1, traffic.dense - before[1]))
        if i == 3 and "pin" in how:
            session.pin(keep=how["pin"])
    return torch.cat([param.full_tensor().flatten() for param in model.parameters()]).tolist(), shares


MIXED = {"every": 2, "always": True, "dtype": torch.bfloat16, "reduce": torch.float32}


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="rows"),
        pytest.param(
            {"columns": True, "every": 2, "clip": 0.05}, id="columns, accumulated, clipped", marks=pytest.mark.slow
        ),
        pytest.param(MIXED, id="accumulated, mixed", marks=pytest.mark.slow),
        pytest.param({"freeze": ("0.*", "1.up.*")}, id="frozen"),
        pytest.param({"pin": 0.0}, id="all off"),
    ],
)
def test_less_is_scattered_and_nothing_changes(ranks: Callable[..., list[Any]], how: dict[str, Any]) -> None:
    dense, less = ranks(sharded, False, how), ranks(sharded, True, how)
    assert [weights for weights, _ in dense] == [weights for weights, _ in less]
    (_, shares), (_, others) = less
    assert shares == others and shares[0] == 1.0 and min(shares) < (0.1 if "pin" in how else 0.8), shares


def unused(rank: int) -> tuple[list[float], int, int]:
    """Of a unit whose parameters are equally large it is not certain which have gradients: all is sent."""
    torch.manual_seed(0)
    model = nn.Sequential(Mlp(32, 32), nn.LayerNorm(32))
    model[0].compile(backend="convaware", options=OPTIONS)
    fully_shard(model)
    traffic = cacompile.reduce_less(model)
    session, optimizer = cacompile.session(model), optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    for i in range(8):
        if i == 4:
            session.pin(keep=0.0)
            session.freeze("0.up.*")
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(10 * i + rank))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([param.full_tensor().flatten() for param in model.parameters()]).tolist(), *vars(traffic).values()


def test_what_is_not_certain_is_sent(ranks: Callable[..., list[Any]]) -> None:
    (weights, dense, sent), other = ranks(unused)
    assert (weights, dense, sent) == other and dense == sent


def other_optimizer(rank: int, sharded: bool) -> tuple[list[list[bool]], list[float]]:
    """The masks of a second optimizer, which begins where the first one has skipped some, and the weights."""
    torch.manual_seed(0)
    model = Mlp(32, 96)
    model.compile(backend="convaware", options=OPTIONS)
    wrapper = fully_shard(model) if sharded else DistributedDataParallel(model)
    cacompile.reduce_less(wrapper)
    masks = []
    for first in (True, False):
        optimizer = optim.AdamW(model.parameters(), lr=1e-3)
        for i in range(8):
            x = torch.randn(4, 32, generator=torch.Generator().manual_seed(10 * i + rank))
            F.cross_entropy(wrapper(x), x.argmax(-1)).backward()
            masks += [] if first else [cacompile.session(model).mask.tolist()]
            optimizer.step()
            optimizer.zero_grad()
    whole = (param.full_tensor() if sharded else param for param in model.parameters())
    return masks, torch.cat([param.detach().flatten() for param in whole]).tolist()


@pytest.mark.parametrize("sharded", [False, True])
def test_an_optimizer_begins_with_all_on(ranks: Callable[..., list[Any]], sharded: bool) -> None:
    """Ranks come to know of its agreement at different readings."""
    (masks, weights), other = ranks(other_optimizer, sharded)
    assert (masks, weights) == other
    assert not all(masks[0]) and all(masks[1]) and not all(masks[-1])


@pytest.mark.slow
def test_under_join_everything_is_sent(ranks: Callable[..., list[Any]]) -> None:
    found = ranks(run_train, True, {"join": True})
    assert found[0][2] == 1.0 and found[0][1] == 0.0


def test_only_for_data_parallel_models() -> None:
    with pytest.raises(ConvAwareError, match=r"must be a DistributedDataParallel, or under fully_shard .*, got Linear"):
        cacompile.reduce_less(nn.Linear(2, 2))
