"""Tensor parallel (`parallelize_module`): each rank skips in its share what all have decided, as one process would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import OPTIONS, Mlp, random_loops
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

import cacompile

WIDTH = 32
HEADS = 4
LENGTH = 6
STEPS = 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        query, key, value = (
            each(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self, hidden: int = 0) -> None:
        """hidden: of two MLPs; 0: one block with attention."""
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(WIDTH, hidden), Mlp(WIDTH, hidden)] if hidden else [Block()])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def parallelize(model: Net, sequence: bool = False) -> None:
    """Among two ranks, by head and by neuron. sequence: all between in pieces of the sequence, and the head in rows."""
    mesh, piece = init_device_mesh("cpu", (2,)), Shard(1)
    column, row = ColwiseParallel(), RowwiseParallel()
    if sequence:
        column, row = ColwiseParallel(input_layouts=piece), RowwiseParallel(output_layouts=piece)
    names = {"query": column, "key": column, "value": column, "up": column, "out": row, "down": row}
    for block in model.blocks:
        plan = {name: style for name, style in names.items() if hasattr(block, name)}
        parallelize_module(block, mesh, {**plan, "norm": SequenceParallel()} if sequence else plan)
    if sequence:
        head = ColwiseParallel(input_layouts=piece, output_layouts=Replicate())
        start = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=piece, use_local_output=True)
        parallelize_module(model, mesh, {"head": head})
        parallelize_module(model, mesh, start)


def batch(step: int) -> Tensor:
    return torch.randn(4, LENGTH, WIDTH, generator=torch.Generator().manual_seed(step))


def loss_of(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return F.cross_entropy(run(x).flatten(0, 1), x.flatten(0, 1).argmax(-1))


def compiled(model: Net, how: str, rows: int = 16) -> Callable[[Tensor], Tensor]:
    """how: "whole" or "blocks". rows: those that a group is to have."""
    options = {**OPTIONS, "block_rows": rows, "keep": ["head"]}  # which is cut up in another way
    for block in model.blocks if how == "blocks" else ():
        block.compile(backend="convaware", options=options)
    return model if how == "blocks" else torch.compile(model, backend="convaware", options=options)


def make(name: str, model: nn.Module) -> optim.Optimizer:
    if name == "sgd":
        return optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-2, foreach=False)
    return optim.AdamW(model.parameters(), lr=1e-3, foreach=False)


def whole(model: nn.Module) -> dict[str, np.ndarray]:
    """Its weights; a collective where ranks have shares of them."""
    named = ((name, param.detach()) for name, param in model.named_parameters())
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).numpy().copy() for name, p in named}


Masks = list[dict[str, bool]]


def train(
    model: Net,
    run: Callable[[Tensor], Tensor],
    masks: Masks | None = None,
    *,
    optimizer: str = "adam",
) -> Masks:
    """The mask after each step. masks: those to skip by, as others had them."""
    stepped, session, found = make(optimizer, model), cacompile.session(model), []
    for i in range(STEPS):
        if masks and i and masks[i - 1]:
            session.pin(masks[i - 1])
        loss_of(run, batch(i)).backward()
        stepped.step()
        stepped.zero_grad()
        named = zip(session.groups, session.mask.tolist())
        found.append({name: on for name, on in named if name.startswith("blocks.")})
    return found


def train_share(
    rank: int, how: str, hidden: int, sequence: bool, settings: dict[str, Any]
) -> tuple[Masks, dict[str, np.ndarray], float, dict[str, str]]:
    """(the mask after each step, the weights in the end, share of dW FLOPs that was skipped here, what is dense)."""
    model = Net(hidden)
    parallelize(model, sequence)
    masks = train(model, compiled(model, how), **settings)
    total, saved = cacompile.session(model).flops
    rows = [row for row in cacompile.explain(model).rows if row.graph >= 0 and len(row.shape) > 1]
    dense = {row.param: row.reason for row in rows if row.reason}
    return masks, whole(model), saved / total, dense


@pytest.mark.parametrize(
    ("how", "hidden", "sequence", "settings"),
    [
        ("blocks", 128, False, {}),
        pytest.param("whole", 0, False, {"optimizer": "sgd"}, marks=pytest.mark.slow),
        pytest.param("blocks", 0, False, {}, marks=pytest.mark.slow),
        pytest.param("whole", 0, True, {}, marks=pytest.mark.slow),
        # groups of 16 rows would not end where a share does, so each has 12
        pytest.param("whole", 72, False, {}, marks=pytest.mark.slow),
    ],
)
def test_as_one_process(
    ranks: Callable[..., list[Any]], how: str, hidden: int, sequence: bool, settings: dict[str, Any]
) -> None:
    found, other = ranks(train_share, how, hidden, sequence, settings)
    masks, weights, skipped, dense = found
    assert masks == other[0] and min(skipped, other[2]) > 0.05 and not dense
    torch.manual_seed(0)
    model = Net(hidden)
    train(model, compiled(model, how, 12 if hidden % 32 else 16), masks, **settings)
    for name, weight in whole(model).items():
        np.testing.assert_array_equal(weights[name], other[1][name])
        np.testing.assert_allclose(weights[name], weight, rtol=1e-4, atol=1e-6)


def frozen(rank: int) -> tuple[list[str], list[bool]]:
    """What was frozen; did the frozen layer stay, neurons of the second rank, and others."""
    model = Net(64)
    parallelize(model)
    run, session, stepped = compiled(model, "whole"), cacompile.session(model), make("adam", model)

    def steps(count: int) -> dict[str, np.ndarray]:
        for i in range(count):
            loss_of(run, batch(i)).backward()
            stepped.step()
            stepped.zero_grad()
        return whole(model)

    steps(2)
    names = session.freeze("blocks.0", "blocks.1.neurons[48:64]")
    before, after = steps(1), steps(3)
    layer = all(np.array_equal(before[name], after[name]) for name in before if name.startswith("blocks.0."))
    up, down = (before[f"blocks.1.{name}.weight"] == after[f"blocks.1.{name}.weight"] for name in ("up", "down"))
    return names, [layer, bool(up[48:].all()), bool(down[:, 48:].all()), bool(up[:48].any() or down[:, :48].any())]


@pytest.mark.slow
def test_what_is_frozen_stays(ranks: Callable[..., list[Any]]) -> None:
    found, other = ranks(frozen)
    assert found == other and "blocks.1.neurons[48:64]" in found[0]
    assert found[1] == [True, True, True, False]


def random_run(rank: int, seed: int, make_name: str, how: str, sequence: bool) -> tuple[list[list[bool]], list[Any]]:
    """The mask after each of 200 steps, and the weights in the end, of a loop that is the same on all ranks."""
    same = np.random.default_rng(seed)
    model = Net(int(same.choice([64, 128])))
    parallelize(model, sequence)
    if not sequence:  # else it is already; torch clips no mixture of DTensors and others
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"head": ColwiseParallel(output_layouts=Replicate())})
    run, stepped, session, masks = compiled(model, how), make(make_name, model), cacompile.session(model), []
    clip, every = float(same.choice([0.0, 0.1])), int(same.integers(1, 3))
    blocks = list(model.blocks)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):  # torch 2.13: no dynamic DTensors
        for i in range(200):
            if how == "blocks":
                model.blocks = nn.ModuleList([block for block in blocks if same.random() < 0.8])
            for _ in range(every):
                x = torch.randn(4, 2 * int(same.integers(1, 4)), WIDTH)
                (loss_of(run, x) / every).backward()
            model.blocks = nn.ModuleList(blocks)
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip, foreach=False)
            stepped.step()
            stepped.zero_grad()
            what = same.random()
            if i > 10 and what < 0.02:
                session.freeze(str(same.choice(["blocks.0.*", "blocks.1.neurons[16:32]", "blocks.1.up.weight"])))
            elif what < 0.05:
                session.thaw()
            masks.append(session.mask.tolist())
    return masks, [weight.tolist() for weight in whole(model).values()]


@pytest.mark.slow
@random_loops(max_examples=4)
@given(
    seed=st.integers(0, 2**16),
    make_name=st.sampled_from(["adam", "sgd"]),
    how=st.sampled_from(["blocks", "whole"]),
    sequence=st.booleans(),
)
def test_random_loops_never_drift(
    ranks: Callable[..., list[Any]], seed: int, make_name: str, how: str, sequence: bool
) -> None:
    (masks, weights), other = ranks(random_run, seed, make_name, how, sequence)
    assert (masks, weights) == other and all(np.isfinite(weight).all() for weight in weights)
    assert any(not on for mask in masks for on in mask)


def looked_at(rank: int) -> tuple[dict[str, str], float, dict[str, Any]]:
    """(why what stays dense does, share of dW FLOPs that can be skipped, the session's state) where some fits badly.

    Of the first rank what it sees alone, before anything has run.
    """
    model = Net(72)
    mesh = init_device_mesh("cpu", (2,))
    model.head = nn.Linear(WIDTH, WIDTH + 1)
    parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Replicate())})
    parallelize_module(model.blocks[0], mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    distribute_module(model.blocks[1], mesh)  # all ranks have all of it
    found = model.blocks[1].forward
    model.blocks[1].forward = lambda x: found(DTensor.from_local(x, mesh, [Replicate()])).to_local()
    run = compiled(model, "whole", 12)
    before = cacompile.explain(model, batch(0), options={**OPTIONS, "block_rows": 12}) if rank == 0 else None
    train(model, run)
    explained = before or cacompile.explain(model)
    reasons = {row.param: row.reason for row in explained.rows if row.reason}
    return reasons, explained.coverage, cacompile.session(model).state_dict()


def test_what_fits_badly_stays_dense_with_a_reason(ranks: Callable[..., list[Any]]) -> None:
    (dense, coverage, state), other = ranks(looked_at)
    assert dense == other[0]
    for rows, counted in ((17, coverage), (16, other[1])):  # of the head, on each rank
        assert counted == pytest.approx(2 * 36 / (2 * 36 + 2 * 72 + rows))
    assert "33 rows along 0 2 ranks share unevenly" in dense["head.weight"]
    assert all("all ranks have all" in dense[f"blocks.1.{name}.weight"] for name in ("up", "down"))
    assert "blocks.0.up.weight" not in dense
    # a session that two ranks have saved goes on in one process
    model = Net(72)
    model.head = nn.Linear(WIDTH, WIDTH + 1)
    run = compiled(model, "whole", 12)
    session = cacompile.session(model)
    session.load_state_dict(state)
    run(batch(0))
    names = [name for name in session.groups if name.startswith("blocks.0.")]
    keep = dict(zip(session.groups, session.keep.tolist()))
    saved = state["parameters"]["blocks.0.up.weight"]["blocks"]["keep"]
    assert [keep[name] for name in names] == saved.tolist() and bool((saved < 1.0).any())


def inside_fsdp(rank: int) -> tuple[dict[str, str], float]:
    """(why weights of blocks stay dense, dW FLOPs that were skipped) where `fully_shard` spreads shares as well."""
    model = Net(64)
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    for block in model.blocks:
        parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(block, mesh=mesh["data"])
    train(model, compiled(model, "blocks"))
    rows = cacompile.explain(model).rows
    found = {row.param: row.reason for row in rows if row.graph >= 0 and len(row.shape) > 1}
    return found, cacompile.session(model).flops[1]


@pytest.mark.slow
def test_what_fsdp_spreads_as_well_stays_dense(ranks: Callable[..., list[Any]]) -> None:
    for found, skipped in ranks(inside_fsdp):
        assert len(found) == 4 and skipped == 0.0
        assert all("fully_shard or DistributedDataParallel spreads as well" in reason for reason in found.values())
