"""FSDP2 (`fully_shard`): all ranks skip the same, and train as one process does that skips it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import OPTIONS, Mlp, random_loops, some_ranks
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn import functional as F

import cacompile
from cacompile.errors import ConvAwareError

WIDTH = 33
HIDDEN = 100
STEPS = 20


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.norm = nn.ModuleList([Mlp(WIDTH, HIDDEN), Mlp(WIDTH, HIDDEN)]), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


def loss_of(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return F.cross_entropy(run(x), x.argmax(-1))


def compiled(model: Net, how: str) -> Callable[[Tensor], Tensor]:
    """how: "whole", "blocks" in place, or "wrapped" blocks as torchtitan has them."""
    for i, block in enumerate(model.blocks):
        if how == "blocks":
            block.compile(backend="convaware", options=OPTIONS)
        if how == "wrapped":
            model.blocks[i] = torch.compile(block, backend="convaware", options=OPTIONS)
    return torch.compile(model, backend="convaware", options=OPTIONS) if how == "whole" else model


def make(name: str, model: nn.Module) -> optim.Optimizer:
    if name == "sgd":
        return optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-2)
    return optim.AdamW(model.parameters(), lr=1e-3, fused=name == "fused")


def train(
    rank: int,
    how: str = "blocks",
    *,
    optimizer: str = "adam",
    reshard: bool = True,
    dtype: torch.dtype | None = None,
    mesh: tuple[int, ...] = (),
    clip: float | None = None,
    every: int = 1,
) -> tuple[list[dict[str, bool]], dict[str, np.ndarray], float]:
    """(the mask after each step, the weights in the end, share of dW FLOPs that were skipped)."""
    model = Net()
    run = compiled(model, how)
    settings: dict[str, Any] = {
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
        "reshard_after_forward": reshard,
    }
    if mesh:
        settings["mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("copies", "shards")[-len(mesh) :])
    for block in model.blocks:
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    stepped = make(optimizer, model)
    session, masks = cacompile.session(model), []
    for i in range(STEPS):
        for micro in range(every):
            model.set_requires_gradient_sync(micro + 1 == every)
            (loss_of(run, batch(i + 1000 * micro, rank)) / every).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        stepped.step()
        stepped.zero_grad()
        masks.append(dict(zip(session.groups, session.mask.tolist())))
    weights = {
        name.replace("_orig_mod.", ""): param.full_tensor().detach().numpy() for name, param in model.named_parameters()
    }
    total, saved = session.flops
    return masks, weights, saved / total


def alone(
    masks: list[dict[str, bool]], optimizer: str = "adam", every: int = 1, ranks: int = 2
) -> dict[str, np.ndarray]:
    """The weights of one process that sees what all ranks see, and skips what they have."""
    torch.manual_seed(0)
    model = Net()
    run = compiled(model, "blocks")
    stepped = make(optimizer, model)
    for i in range(STEPS):
        if i and masks[i - 1]:
            cacompile.session(model).pin(masks[i - 1])
        for micro in range(every):
            losses = [loss_of(run, batch(i + 1000 * micro, rank)) for rank in range(ranks)]
            (torch.stack(losses).mean() / every).backward()
        stepped.step()
        stepped.zero_grad()
    return {name: param.detach().numpy() for name, param in model.named_parameters()}


@pytest.mark.parametrize(
    ("how", "settings"),
    [
        ("blocks", {}),
        ("whole", {"reshard": False, "optimizer": "sgd"}),
        pytest.param("wrapped", {"optimizer": "fused"}, marks=pytest.mark.slow),
        pytest.param("blocks", {"every": 3}, marks=pytest.mark.slow),
        pytest.param("blocks", {"mesh": (2, 1)}, marks=pytest.mark.slow),
        pytest.param("blocks", {"mesh": (1, 2)}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_as_one_process(ranks: Callable[..., list[Any]], how: str, settings: dict[str, Any]) -> None:
    (masks, weights, skipped), (others, _, _) = ranks(run_rank, how, settings)
    assert masks == others and skipped > 0.05
    expected = alone(masks, **{name: settings[name] for name in ("optimizer", "every") if name in settings})
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_copies_of_shards() -> None:
    """HSDP: two copies, each in two shards."""
    with some_ranks(4) as run:
        found = run(run_rank, "blocks", {"mesh": (2, 2)})
    masks, weights, skipped = found[0]
    assert all(each[0] == masks for each in found) and skipped > 0.05
    expected = alone(masks, ranks=4)
    for name, weight in weights.items():
        np.testing.assert_allclose(weight, expected[name], rtol=1e-4, atol=1e-6)


def run_rank(rank: int, how: str, settings: dict[str, Any]) -> Any:
    return train(rank, how, **settings)


@pytest.mark.parametrize("reshard", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_mixed_precision(ranks: Callable[..., list[Any]], reshard: bool) -> None:
    (masks, _, skipped), (others, _, _) = ranks(run_rank, "whole", {"dtype": torch.bfloat16, "reshard": reshard})
    assert masks == others and skipped > 0.05


def norms(rank: int) -> tuple[float, float, float]:
    """Of gradients that stay as they are: the norm of all, what clipping takes it for while some are skipped, and the
    norm of what was computed then."""
    model = Net()
    run = compiled(model, "blocks")
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    session, optimizer, clipped, plain = cacompile.session(model), optim.SGD(model.parameters(), lr=0.0), [], []
    for i in range(20):
        loss_of(run, batch(0, rank)).backward()
        flat = torch.cat([param.grad.full_tensor().flatten() for param in model.parameters()])
        clipped.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1e9).full_tensor()))
        plain.append(float(flat.norm()))
        optimizer.step()
        optimizer.zero_grad()
        if i in (4, 12):  # it holds two steps later, on all ranks
            session.pin({"blocks.0.neurons": i > 4, "blocks.1.neurons[16:32]": i > 4, "blocks.1.up.weight": i < 5})
    return clipped[0], clipped[-1], plain[-1]


def test_clipping_counts_what_is_skipped(ranks: Callable[..., list[Any]]) -> None:
    found, others = ranks(norms)
    assert found == others
    whole, clipped, plain = found
    assert clipped == pytest.approx(whole, rel=1e-4) and plain < 0.95 * whole


def looked_at(rank: int) -> tuple[list[str], str, str]:
    """What one rank alone sees before the model has run, what each sees after, and its status."""
    model = Net()
    run = compiled(model, "blocks")
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    before = cacompile.explain(model, batch(0, 0), options=OPTIONS) if rank == 0 else None
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    for i in range(10):
        loss_of(run, batch(i, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    masked = [row.param for row in before.rows if row.operation] if before else []
    return masked, str(cacompile.explain(model)), str(cacompile.status(model))


def test_it_can_be_explained(ranks: Callable[..., list[Any]]) -> None:
    (masked, found, status), (_, other, other_status) = ranks(looked_at)
    assert masked == [f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("up", "down")]
    assert found == other and "4 of 10 parameters masked" in found
    assert status == other_status and "groups skipped" in status


def frozen(rank: int) -> tuple[list[str], list[bool]]:
    """What was frozen, and of what trained after: did the frozen layer stay, the frozen neurons, and the others."""
    model = Net()
    run = compiled(model, "blocks")
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    session, optimizer = cacompile.session(model), optim.AdamW(model.parameters(), lr=1e-3)

    def steps(count: int) -> dict[str, Tensor]:
        for i in range(count):
            loss_of(run, batch(i, rank)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return {name: param.full_tensor().detach().clone() for name, param in model.named_parameters()}

    steps(2)
    names = session.freeze("blocks.0.*", "blocks.1.neurons[48:64]")
    before, after = steps(1), steps(4)
    layer = all(torch.equal(before[name], after[name]) for name in before if name.startswith("blocks.0."))
    up, down = (before[f"blocks.1.{name}.weight"] == after[f"blocks.1.{name}.weight"] for name in ("up", "down"))
    stayed = [layer, bool(up[48:64].all()), bool(down[:, 48:64].all()), bool(up[:48].any())]
    session.thaw()
    return names, [*stayed, torch.equal(after["blocks.0.up.weight"], steps(1)["blocks.0.up.weight"])]


def test_what_is_frozen_stays(ranks: Callable[..., list[Any]]) -> None:
    """Neurons 48 to 63 lie on both ranks."""
    found, others = ranks(frozen)
    assert found == others and len(found[0]) == 5
    assert found[1] == [True, True, True, False, False]


class Heard(logging.Handler):
    """What cacompile says."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def in_flat_parameters(rank: int) -> tuple[list[str], str]:
    """What is said of FSDP1, and the error of explain, on the first rank alone."""
    heard = Heard()
    logging.getLogger("cacompile").addHandler(heard)
    model = FullyShardedDataParallel(Net(), use_orig_params=True, device_id=torch.device("cpu"))
    run = torch.compile(model, backend="convaware", options=OPTIONS)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3)
    for i in range(3):
        loss_of(run, batch(i, rank)).backward()
        optimizer.step()
        optimizer.zero_grad()
    try:
        return heard.texts, "" if rank else str(cacompile.explain(run, batch(0, 0)))
    except ConvAwareError as error:
        return heard.texts, str(error)
    finally:
        logging.getLogger("cacompile").removeHandler(heard)


@pytest.mark.slow
def test_the_first_fsdp_stays_dense_and_says_so(ranks: Callable[..., list[Any]]) -> None:
    found = ranks(in_flat_parameters)
    assert all(any("made anew for each forward pass" in text for text in texts) for texts, _ in found)
    assert "FSDP1" in found[0][1]


def random_run(
    rank: int, seed: int, make_name: str, whole: bool, copies: bool, less: bool
) -> tuple[list[list[bool]], list[float]]:
    """The mask after each of 200 steps, and the weights in the end, of a loop that is the same but for the batches."""
    same, own = np.random.default_rng(seed), np.random.default_rng([seed, rank])
    model = Net()
    run = compiled(model, "whole" if whole else "blocks")
    mesh = {"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))} if copies else {}
    for part in (*model.blocks, model):
        fully_shard(part, reshard_after_forward=bool(same.integers(2)), **mesh)
    if less:
        cacompile.reduce_less(model)
    optimizer, session, masks = make(make_name, model), cacompile.session(model), []
    clip = float(same.choice([0.0, 0.1]))
    for _ in range(200):
        every = int(same.integers(1, 3))
        for micro in range(every):
            model.set_requires_gradient_sync(micro + 1 == every)
            x = torch.from_numpy(own.standard_normal((2, int(own.integers(2, 12)), WIDTH))).float()
            F.cross_entropy(run(x).flatten(0, 1), x.flatten(0, 1).argmax(-1)).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        what = same.random()
        if what < 0.02:
            session.freeze(str(same.choice(["blocks.0.*", "blocks.1.neurons[16:32]", "norm"])))
        elif what < 0.05:
            session.thaw()
        masks.append(session.mask.tolist())
    weights = torch.cat([param.full_tensor().detach().flatten() for param in model.parameters()])
    return masks, weights.tolist()


@pytest.mark.slow
@random_loops(max_examples=12)
@given(
    seed=st.integers(0, 2**16),
    make=st.sampled_from(["adam", "sgd"]),
    whole=st.booleans(),
    copies=st.booleans(),
    less=st.booleans(),
)
def test_random_loops_never_drift(
    ranks: Callable[..., list[Any]], seed: int, make: str, whole: bool, copies: bool, less: bool
) -> None:
    """With copies each rank has all weights of its own, which nothing but equal steps keeps equal."""
    (masks, weights), other = ranks(random_run, seed, make, whole, copies, less)
    assert (masks, weights) == other and np.isfinite(weights).all()
    assert any(not on for mask in masks for on in mask)
