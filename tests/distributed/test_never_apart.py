"""Ranks under DistributedDataParallel see other lengths, branches, orders and numbers of batches, and stay equal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import OPTIONS, Mlp, apart, random_loops
from torch import Tensor, nn, optim
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.ddp_zero_hook import hook_with_zero_step
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import cacompile
from cacompile.errors import ConvAwareError

WIDTH = 32


class Net(nn.Module):
    """Token-wise blocks, of which any may be left out or run before another, and a pooled layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.pool = Mlp(WIDTH, 4 * WIDTH), Mlp(WIDTH, 4 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, path: str) -> Tensor:
        for name in path:
            x = self.b(x) if name == "b" else self.a(x)
        return self.pool(x[:, 0])


def train(
    rank: int,
    batches: list[tuple[int, str]],
    *,
    by_block: bool = False,
    make: Callable[..., optim.Optimizer] = optim.AdamW,
    lr: float = 1e-3,
    every: int = 1,
    clip: float | None = None,
    join: bool = False,
    after: int = 0,
    pin: dict[str, Any] | None = None,
    freeze: dict[int, str] | None = None,
    less: bool = False,
    **options: Any,
) -> tuple[float, float]:
    """(how far apart the ranks are, share of dW FLOPs that this one has skipped).

    batches: length and path of each. every: micro-batches of a step. after: batches once all have joined. freeze: step
    -> what is frozen before it, "" for thawing all. less: what is off is not sent.
    """
    options = {**OPTIONS, **options}
    model = Net()
    if by_block:
        for block in (model.a, model.b):
            block.compile(backend="convaware", options=options)
    run = model if by_block else torch.compile(model, backend="convaware", options=options)
    wrapper = DistributedDataParallel(run, find_unused_parameters=True)
    if less:
        cacompile.reduce_less(wrapper)
    optimizer = make(wrapper.parameters(), lr=lr)
    session = cacompile.session(model)
    if pin:
        session.pin(**pin)

    def step(i: int, length: int, path: str) -> None:
        torch.manual_seed(100 * i + rank)
        if freeze and (pattern := freeze.get(i)) is not None:
            session.freeze(pattern) if pattern else session.thaw()
        for micro in range(every):
            x = torch.randn(4, length, WIDTH)
            with wrapper.no_sync() if micro + 1 < every else contextlib.nullcontext():
                F.cross_entropy(wrapper(x, path), x[:, 0].argmax(-1)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    joined = [wrapper, optimizer] if isinstance(optimizer, ZeroRedundancyOptimizer) else [wrapper]
    with Join(joined, enable=join):
        for i, batch in enumerate(batches):
            step(i, *batch)
    for i in range(after):
        step(1000 + i, 8, "ab")
    total, saved = session.flops
    return apart(model), saved / total


def lengths(rank: int) -> tuple[float, float]:
    each = [[6, 14, 10, 12], [20, 10, 18, 8]][rank]
    return train(rank, [(each[i % 4], "ab") for i in range(24)])


def branches(rank: int, **how: Any) -> tuple[float, float]:
    return train(rank, [(8, "ab"[(i + rank) % 2]) for i in range(24)], **how)


def late(rank: int) -> tuple[float, float]:
    """One rank meets a block long after the other, and neither knows of the other's before."""
    return train(
        rank, [(8, "a" if rank == 0 or i > 11 else "b") if i < 14 else (8, "ab") for i in range(30)], by_block=True
    )


def uneven(rank: int, batches: list[int], **how: Any) -> tuple[float, float]:
    return train(rank, [(8, "ab")] * batches[rank], join=True, after=9, **how)


def assert_together(found: list[tuple[float, float]], least: float = 0.05) -> None:
    assert [difference for difference, _ in found] == [0.0, 0.0]
    assert all(skipped > least for _, skipped in found), found


def test_lengths_differ(ranks: Callable[..., list[Any]]) -> None:
    assert_together(ranks(lengths))


def accumulated(rank: int) -> tuple[float, float]:
    return branches(rank, every=2, clip=0.05)


def by_block(rank: int) -> tuple[float, float]:
    return branches(rank, by_block=True)


@pytest.mark.parametrize("how", [branches, by_block, accumulated, late])
def test_branches_and_orders_differ(ranks: Callable[..., list[Any]], how: Callable[..., Any]) -> None:
    assert_together(ranks(how))


def joined(rank: int, first: int) -> tuple[float, float]:
    return uneven(rank, [9, 16] if first == 0 else [16, 9], make=optim.SGD, lr=1e-2)


@pytest.mark.parametrize("first", [0, 1])
def test_one_rank_has_fewer_batches(ranks: Callable[..., list[Any]], first: int) -> None:
    """Without momentum: what an optimizer keeps is not brought together by DistributedDataParallel."""
    assert_together(ranks(joined, first))


def zero1(*params: Any, **settings: Any) -> optim.Optimizer:
    return ZeroRedundancyOptimizer(*params, optim.AdamW, **settings)


def sharded(rank: int) -> tuple[float, float]:
    return branches(rank, make=zero1)


def sharded_joined(rank: int) -> tuple[float, float]:
    return uneven(rank, [9, 16], make=zero1)


@pytest.mark.parametrize("how", [sharded, sharded_joined])
def test_each_rank_steps_parameters_of_its_own(ranks: Callable[..., list[Any]], how: Callable[..., Any]) -> None:
    assert_together(ranks(how))


def overlapped(rank: int, monkeypatch: pytest.MonkeyPatch, backend: str) -> tuple[Tensor, float]:
    """The weights, and dW FLOPs skipped, where ZeroRedundancyOptimizer steps within the backward pass."""
    torch.manual_seed(0)
    model = Net()
    run = torch.compile(model, backend=backend, options=OPTIONS if backend == "convaware" else None)
    wrapper = DistributedDataParallel(run)
    optimizer: Any = ZeroRedundancyOptimizer(wrapper.parameters(), optim.AdamW, overlap_with_ddp=True, lr=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(dist, "get_backend", lambda group: "nccl")  # torch takes no gloo here: it might hang
        wrapper.register_comm_hook(None, hook_with_zero_step(allreduce_hook, wrapper, optimizer))
    for i in range(12):
        x = torch.randn(4, 8, WIDTH, generator=torch.Generator().manual_seed(10 * i + rank))
        F.cross_entropy(wrapper(x, "ab"), x[:, 0].argmax(-1)).backward()
        optimizer.step()  # which does nothing but log that it does
        wrapper.zero_grad()
    weights = torch.cat([param.detach().flatten() for param in model.parameters()])
    return weights, cacompile.session(model).flops[1]


def both_overlapped(rank: int) -> tuple[bool, float]:
    with pytest.MonkeyPatch.context() as patch:
        (plain, _), (ours, skipped) = (overlapped(rank, patch, backend) for backend in ("aot_eager", "convaware"))
    return torch.equal(plain, ours), skipped


def test_steps_within_the_backward_pass_are_left_alone(ranks: Callable[..., list[Any]]) -> None:
    assert ranks(both_overlapped) == [(True, 0.0)] * 2


def grown(rank: int) -> tuple[float, float]:
    """Blocks that the optimizer gets one by one, as in gradual unfreezing."""
    model = Net()
    wrapper = DistributedDataParallel(torch.compile(model, backend="convaware", options=OPTIONS))
    optimizer = optim.AdamW([*model.pool.parameters(), *model.b.parameters()], lr=1e-3)
    off = []
    for i in range(30):
        if i == 9:
            optimizer.add_param_group({"params": model.a.parameters()})
        x = torch.randn(4, 8, WIDTH, generator=torch.Generator().manual_seed(10 * i + rank))
        F.cross_entropy(wrapper(x, "ab"), x[:, 0].argmax(-1)).backward()
        optimizer.step()
        wrapper.zero_grad()
        off.append(1.0 - cacompile.session(model).params["a.up.weight"].on.mean())
    return apart(model), float(np.mean(off[9:]))


def test_an_optimizer_gets_more_parameters(ranks: Callable[..., list[Any]]) -> None:
    assert_together(ranks(grown))


def same_masks(rank: int) -> list[bool]:
    """Of what one rank steps, the other skips the same."""
    torch.manual_seed(0)
    model = Net()
    wrapper = DistributedDataParallel(torch.compile(model, backend="convaware", options=OPTIONS))
    optimizer = zero1(wrapper.parameters(), lr=1e-3)
    found = []
    for i in range(16):
        torch.manual_seed(100 * i + rank)
        x = torch.randn(4, 8, WIDTH)
        F.cross_entropy(wrapper(x, "ab"), x[:, 0].argmax(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        found += cacompile.session(model).mask.tolist()
    return found


def test_masks_are_the_same_where_scores_are_not(ranks: Callable[..., list[Any]]) -> None:
    first, second = ranks(same_masks)
    assert first == second and not all(first)


def pinned(rank: int) -> tuple[float, float]:
    return branches(rank, by_block=True, pin={"keep": 0.5})


def test_a_pin_is_told_to_all(ranks: Callable[..., list[Any]]) -> None:
    assert_together(ranks(pinned))


def no_masked_version(rank: int) -> tuple[float, float]:
    """One rank computes everything, also where the mask is off."""
    from cacompile.passes.verify import Broken

    def broken(*args: Any) -> None:
        raise Broken("for a test")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:
            patch.setattr("cacompile.graph.masked.verify", broken)
        return train(rank, [(8, "ab")] * 20)


def test_a_dense_fallback_on_one_rank(ranks: Callable[..., list[Any]]) -> None:
    found = ranks(no_masked_version)
    assert_together(found[:1] * 2)
    assert found[1] == (0.0, 0.0)


def alone(rank: int) -> float:
    """Each rank has a model of its own, in a job of several; only one of them trains for long."""
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, WIDTH))
    run = torch.compile(model, backend="convaware", options={**OPTIONS, "seed": rank})
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(20 if rank else 6):
        x = torch.randn(8, WIDTH)
        F.cross_entropy(run(x), x.argmax(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return cacompile.session(model).flops[1]


def test_models_of_their_own_wait_for_nobody(ranks: Callable[..., list[Any]]) -> None:
    assert all(saved > 0.0 for saved in ranks(alone))


def other_option(rank: int, name: str, values: list[Any]) -> str:
    try:
        train(rank, [(8, "ab")] * 12, **{name: values[rank]})
    except ConvAwareError as error:
        return str(error)
    except RuntimeError:
        return ""  # the other one is gone
    return "nothing"


@pytest.mark.parametrize(
    ("name", "values"), [("seed", [0, 1]), pytest.param("monitor_every", [2, 4], marks=pytest.mark.slow)]
)
def test_what_differs_between_ranks_is_named(ranks: Callable[..., list[Any]], name: str, values: list[Any]) -> None:
    (text,) = ranks(other_option, name, values, first=True)
    assert f"option '{name}'" in text and "rank 1" in text


def drifted(rank: int) -> str:
    """A state is taken over by one rank alone."""
    model = Net()
    wrapper = DistributedDataParallel(torch.compile(model, backend="convaware", options=OPTIONS))
    optimizer = optim.AdamW(wrapper.parameters(), lr=1e-3)
    session = cacompile.session(model)
    try:
        for i in range(16):
            x = torch.randn(4, 8, WIDTH)
            F.cross_entropy(wrapper(x, "ab"), x[:, 0].argmax(-1)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if i == 8 and rank == 1:
                for state in session.params.values():
                    state.step += 2
    except ConvAwareError as error:
        return str(error)
    except RuntimeError:
        return ""
    return "nothing"


@pytest.mark.slow
def test_drift_is_an_error(ranks: Callable[..., list[Any]]) -> None:
    (text,) = ranks(drifted, first=True)
    assert "drifted apart: their optimizer steps differ" in text


def random_run(rank: int, seed: int, make: str, by_block: bool, less: bool) -> tuple[float, float]:
    random = np.random.default_rng([seed, rank])
    batches = [(int(random.integers(4, 24)), str(random.choice(["a", "b", "ab", "ba", ""]))) for _ in range(200)]
    how = np.random.default_rng(seed)
    steps = how.choice(np.arange(20, 200), 8, replace=False)
    return train(
        rank,
        batches,
        by_block=by_block,
        make=zero1 if make == "zero1" else optim.SGD if make == "sgd" else optim.AdamW,
        every=int(how.integers(1, 3)),
        clip=float(how.choice([0.0, 0.1])) or None,
        freeze={int(i): str(how.choice(["a.*", "b.neurons[16:32]", "pool", "", ""])) for i in steps},
        less=less,
        monitor_every=int(how.integers(2 if make == "sgd" else 1, 6)),  # without momentum each reading computes all
    )


@pytest.mark.slow
@random_loops(max_examples=6)
@given(
    seed=st.integers(0, 2**16),
    make=st.sampled_from(["adam", "sgd", "zero1"]),
    by_block=st.booleans(),
    less=st.booleans(),
)
def test_random_loops_never_drift(
    ranks: Callable[..., list[Any]], seed: int, make: str, by_block: bool, less: bool
) -> None:
    assert_together(ranks(random_run, seed, make, by_block, less), least=0.0)


def random_join(rank: int, seed: int, make: str, by_block: bool) -> tuple[float, float]:
    """One rank runs out of batches at some time, and all go on."""
    own, same = np.random.default_rng([seed, rank]), np.random.default_rng(seed)
    batches = [(int(own.integers(4, 24)), "ab") for _ in range(int(own.integers(20, 200)))]
    steps = same.choice(np.arange(4, 20), 3, replace=False)  # both are there by then
    return train(
        rank,
        batches,
        by_block=by_block,
        make=zero1 if make == "zero1" else optim.SGD,
        lr=1e-3 if make == "zero1" else 1e-2,
        freeze={int(i): str(same.choice(["a.*", "b.neurons[16:32]", "pool", ""])) for i in steps},
        join=True,
        after=40,
        monitor_every=int(same.integers(2, 6)),
    )


@pytest.mark.slow
@random_loops(max_examples=4)
@given(seed=st.integers(0, 2**16), make=st.sampled_from(["sgd", "zero1"]), by_block=st.booleans())
def test_random_joins_never_drift(ranks: Callable[..., list[Any]], seed: int, make: str, by_block: bool) -> None:
    assert_together(ranks(random_join, seed, make, by_block), least=0.0)
