"""Tensor parallel on meshes of several dimensions, or inside FSDP2 or DDP: all is computed, as without us, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ranks import OPTIONS, Mlp, some_ranks
from torch import nn, optim
from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import cacompile
from cacompile.errors import ConvAwareError

WIDTH = 32


def spread(model: nn.Sequential, mesh: DeviceMesh) -> None:
    """Each weight of its blocks on all of a mesh: copies along the first dimension, pieces along the second."""
    batch = [Shard(0), Replicate()]
    placed = {"up.weight": Shard(0), "up.bias": Shard(0), "down.weight": Shard(1), "down.bias": Replicate()}
    for block in model[:2]:
        for name, placement in placed.items():
            param = distribute_tensor(block.get_parameter(name).detach(), mesh, [Replicate(), placement])
            layer, own = name.split(".")
            setattr(getattr(block, layer), own, nn.Parameter(param))
        block.register_forward_pre_hook(lambda _, args: DTensor.from_local(args[0], mesh, batch))
        block.register_forward_hook(lambda _, args, y: y.redistribute(placements=batch).to_local())


def train(rank: int, how: str, backend: str, size: tuple[int, int]) -> tuple[dict[str, np.ndarray], nn.Module]:
    """The weights after some steps, and the model. how: what is done with its blocks."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    mesh = init_device_mesh("cpu", size, mesh_dim_names=("data", "tensor"))
    model: Any = nn.Sequential(Mlp(WIDTH, 64), Mlp(WIDTH, 64), nn.Linear(WIDTH, WIDTH))
    if how == "mesh":
        spread(model, mesh)
    else:
        for block in model[:2]:
            parallelize_module(block, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    options = OPTIONS if backend == "convaware" else None
    for block in model[:2]:
        block.compile(backend=backend, options=options)
        if how == "fsdp":
            fully_shard(block, mesh=mesh["data"])
    if how == "fsdp":
        fully_shard(model, mesh=mesh["data"])
    if how == "replicate":
        replicate(model, device_mesh=mesh["data"])
    run = DistributedDataParallel(model, device_mesh=mesh["data"]) if how == "ddp" else model
    params = dict(model.named_parameters())  # which DDP around tensor parallel takes away
    optimizer = optim.AdamW(params.values(), lr=1e-3, foreach=False)
    for i in range(12):
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * i + rank // size[1]))
        y = run(x)
        F.cross_entropy(y, x.argmax(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: getattr(param, "full_tensor", lambda p=param: p)() for name, param in params.items()}
    return {name: weight.detach().numpy().copy() for name, weight in weights.items()}, model


def both(rank: int, how: str, size: tuple[int, int]) -> tuple[bool, float, set[str]]:
    """(are all weights as without us, dW FLOPs that were skipped, why weights stay dense)."""
    plain, _ = train(rank, how, "aot_eager", size)
    ours, model = train(rank, how, "convaware", size)
    same = len(plain) == 10 and all(np.array_equal(ours[name], weight) for name, weight in plain.items())
    try:
        reasons = {row.reason for row in cacompile.explain(model).rows if row.graph >= 0 and len(row.shape) > 1}
    except ConvAwareError as error:
        reasons = {str(error)}
    return same, cacompile.session(model).flops[1], reasons


@pytest.fixture(scope="module")
def four() -> Any:
    with some_ranks(4) as run:
        yield run


SPREAD = "is a DTensor that fully_shard or DistributedDataParallel spreads as well"
ANEW = "weights that are made anew for each forward pass"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "words"),
    [("fsdp", SPREAD), ("ddp", ANEW), ("replicate", ANEW), ("mesh", "is a DTensor on a mesh of 2 dimensions")],
)
def test_as_without_us_and_dense_with_a_reason(four: Callable[..., list[Any]], how: str, words: str) -> None:
    for same, skipped, reasons in four(both, how, (2, 2)):
        assert same and skipped == 0.0
        assert reasons and all(words in reason for reason in reasons)
