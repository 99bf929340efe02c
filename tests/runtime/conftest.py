"""Parameters under care without any compiling, and a backward that skips what the mask says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from cacompile.config import Config
from cacompile.runtime.stepping import follow_optimizers
from cacompile.runtime.tracked import Partition, Tracked, registry

OPTIONS = {"warmup_steps": 0, "monitor_every": 10**6}

Make = Callable[..., tuple[nn.Parameter, Tracked]]


@pytest.fixture
def make() -> Make:
    """make(*shape, dim=0, block=2, name="w", **options) -> a parameter with random values, and its record."""

    def make(
        *shape: int, dim: int = 0, block: int = 2, name: str = "w", dtype: torch.dtype | None = None, **options: object
    ) -> tuple[nn.Parameter, Tracked]:
        param = nn.Parameter(torch.randn(shape, dtype=dtype))
        record = registry.track(param, name)
        assert record.cut(Partition(dim, block, shape[dim]), Config(**{**OPTIONS, **options}), name)
        record.flops[:] = 1e6
        return param, record

    return make


@pytest.fixture
def backward() -> Callable[[Tracked], None]:
    """A backward as a compiled graph does it: a random gradient, zeros where the mask is off, and that is noted."""

    def run(record: Tracked, scale: float = 1.0) -> None:
        param = record.ref()
        assert param is not None
        grad = torch.randn_like(param) * scale
        off = ~record.state.on
        grad.index_fill_(record.partition.dim, rows_of(record, off), 0.0)
        record.skipped |= off
        param.grad = grad if param.grad is None else param.grad + grad

    return run


def rows_of(record: Tracked, chosen: np.ndarray) -> torch.Tensor:
    """Indices of the rows of the chosen groups."""
    return torch.from_numpy(np.flatnonzero(np.repeat(chosen, record.partition.block)[: record.partition.rows]))


@pytest.fixture
def rows() -> Callable[[Tracked, np.ndarray], torch.Tensor]:
    return rows_of


@pytest.fixture
def followed() -> None:
    """The hooks of optimizer.step are in place."""
    follow_optimizers()
