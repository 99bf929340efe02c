"""Fixtures for ParamStates without any compiling, and for a backward that skips what the mask says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from cacompile.config import Config
from cacompile.hooks.steps import follow_optimizers
from cacompile.layout import Partition
from cacompile.state.params import ParamState
from cacompile.state.registry import registry

OPTIONS = {"warmup_steps": 0, "monitor_every": 10**6}

Make = Callable[..., tuple[nn.Parameter, ParamState]]


@pytest.fixture
def make() -> Make:
    """make(*shape, dim=0, block=2, name="w", **options) -> a parameter with random values, and its state."""

    def make(
        *shape: int, dim: int = 0, block: int = 2, name: str = "w", dtype: torch.dtype | None = None, **options: object
    ) -> tuple[nn.Parameter, ParamState]:
        param = nn.Parameter(torch.randn(shape, dtype=dtype))
        state = registry.track(param, name)
        assert state.part(Partition(dim, block, shape[dim]), Config(**{**OPTIONS, **options}), name)
        state.flops[:] = 1e6
        return param, state

    return make


@pytest.fixture
def backward() -> Callable[[ParamState], None]:
    """A backward as a compiled graph does it: a random gradient, zeros where the mask is off, and that is noted."""

    def run(state: ParamState, scale: float = 1.0) -> None:
        param = state.param
        assert param is not None
        grad = torch.randn_like(param) * scale
        off = ~state.on
        grad.index_fill_(state.partition.dim, rows_of(state, off), 0.0)
        state.skipped[:] |= off
        param.grad = grad if param.grad is None else param.grad + grad

    return run


def rows_of(state: ParamState, chosen: np.ndarray) -> torch.Tensor:
    """Indices of the rows of the chosen groups."""
    return torch.from_numpy(np.flatnonzero(np.repeat(chosen, state.partition.block)[: state.partition.rows]))


@pytest.fixture
def rows() -> Callable[[ParamState, np.ndarray], torch.Tensor]:
    return rows_of


@pytest.fixture
def followed() -> None:
    """The hooks of optimizer.step are in place."""
    follow_optimizers()
