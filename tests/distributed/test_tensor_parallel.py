"""Tensor parallel (`parallelize_module`): each rank skips in its share what all have decided, as one process would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import OPTIONS
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
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
    """Attention and an MLP, as they are split among ranks: by head and by neuron."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        query, key, value = (
            each(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for each in (self.query, self.key, self.value)
        )
        found = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)))


class Net(nn.Module):
    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList([Block(hidden), Block(hidden)]), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


PLAN: dict[str, Any] = {
    **dict.fromkeys(("query", "key", "value", "up"), ColwiseParallel()),
    **dict.fromkeys(("out", "down"), RowwiseParallel()),
}


def batch(step: int) -> Tensor:
    return torch.randn(4, LENGTH, WIDTH, generator=torch.Generator().manual_seed(step))


def loss_of(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return F.cross_entropy(run(x).flatten(0, 1), x.flatten(0, 1).argmax(-1))


def compiled(model: Net, how: str) -> Callable[[Tensor], Tensor]:
    """how: "whole" or "blocks"."""
    for block in model.blocks if how == "blocks" else ():
        block.compile(backend="convaware", options=OPTIONS)
    return model if how == "blocks" else torch.compile(model, backend="convaware", options=OPTIONS)


def make(name: str, model: nn.Module) -> optim.Optimizer:
    if name == "sgd":
        return optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-2, foreach=False)
    return optim.AdamW(model.parameters(), lr=1e-3, foreach=False)


def whole(model: nn.Module) -> dict[str, np.ndarray]:
    """Its weights; a collective where ranks have shares of them."""
    named = ((name, param.detach()) for name, param in model.named_parameters())
    return {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).numpy().copy() for name, p in named}


def train(
    rank: int, how: str, optimizer: str = "adam", hidden: int = 128
) -> tuple[list[dict[str, bool]], dict[str, np.ndarray], float]:
    """(the mask after each step, the weights in the end, share of dW FLOPs that this rank has skipped)."""
    model = Net(hidden)
    for block in model.blocks:
        parallelize_module(block, init_device_mesh("cpu", (2,)), PLAN)
    run = compiled(model, how)
    stepped, session, masks = make(optimizer, model), cacompile.session(model), []
    for i in range(STEPS):
        loss_of(run, batch(i)).backward()
        stepped.step()
        stepped.zero_grad()
        masks.append(dict(zip(session.groups, session.mask.tolist())))
    total, saved = session.flops
    return masks, whole(model), saved / total


def alone(masks: list[dict[str, bool]], how: str, optimizer: str = "adam", hidden: int = 128) -> dict[str, np.ndarray]:
    """The weights of one process that skips what the ranks have."""
    torch.manual_seed(0)
    model = Net(hidden)
    run, stepped = compiled(model, how), make(optimizer, model)
    for i in range(STEPS):
        if i and masks[i - 1]:
            cacompile.session(model).pin(masks[i - 1])
        loss_of(run, batch(i)).backward()
        stepped.step()
        stepped.zero_grad()
    return whole(model)


@pytest.mark.parametrize(
    ("how", "settings"),
    [
        ("blocks", {}),
        pytest.param("whole", {"optimizer": "sgd"}, marks=pytest.mark.slow),
        pytest.param("whole", {"hidden": 72}, marks=pytest.mark.slow),  # groups of 16 do not end where a share does
    ],
    ids=str,
)
def test_as_one_process(ranks: Callable[..., list[Any]], how: str, settings: dict[str, Any]) -> None:
    (masks, weights, skipped), (others, other_weights, other_skipped) = ranks(run_rank, how, settings)
    assert masks == others and min(skipped, other_skipped) > 0.05
    expected = alone(masks, how, **settings)
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight, other_weights[name])
        np.testing.assert_allclose(weight, expected[name], rtol=1e-4, atol=1e-6)


def run_rank(rank: int, how: str, settings: dict[str, Any]) -> Any:
    return train(rank, how, **settings)
