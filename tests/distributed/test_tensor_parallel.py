"""Tensor parallel: what is a DTensor in the graph stays dense with that reason, and is counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import OPTIONS
from torch import Tensor, nn, optim
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

import cacompile

WIDTH = 32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(F.gelu(self.up(x))))


def train(rank: int) -> tuple[dict[str, str], float, list[bool], list[float]]:
    """(why what stays dense, share of dW FLOPs that can be skipped, the last mask, weights that all ranks have)."""
    model = Net()
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    run = torch.compile(model, backend="convaware", options=OPTIONS)
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    for i in range(16):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(i))
        F.cross_entropy(run(x), x.argmax(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = cacompile.explain(model)
    reasons = {row.param: row.reason for row in found.rows}
    return reasons, found.coverage, cacompile.session(model).mask.tolist(), model.head.weight.flatten().tolist()


@pytest.mark.slow
def test_sharded_layers_stay_dense_and_are_counted(ranks: Callable[..., list[Any]]) -> None:
    (reasons, coverage, mask, weights), other = ranks(train)
    assert all("is a DTensor" in reasons[f"{name}.weight"] for name in ("up", "down")) and not reasons["head.weight"]
    # of one rank's products: two of half a matrix of 32 x 128, and one of 32 x 32
    assert coverage == pytest.approx(1 / 5)
    assert (mask, weights) == other[2:]
