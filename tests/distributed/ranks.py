"""Processes that train together over gloo, each of which runs what a test hands it."""

from __future__ import annotations

import functools
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, settings
from torch import distributed as dist
from torch import nn

RANKS = 2

OPTIONS = {"warmup_steps": 2, "monitor_every": 2, "tolerance": 0.5, "block_rows": 16, "inner": "aot_eager"}


random_loops = functools.partial(
    settings, phases=[Phase.explicit, Phase.generate], deadline=None, suppress_health_check=list(HealthCheck)
)
"""Settings of a test of random loops. No smaller example is looked for: each takes a minute, and may end the ranks."""


class Mlp(nn.Module):
    """A residual block: (..., width) to the same."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.gelu(self.up(x)))


@contextmanager
def some_ranks(count: int = RANKS) -> Iterator[Callable[..., list[Any]]]:
    """run(function, *args): calls function(rank, *args) in all processes at once; what they return, by rank.

    first: only what the first one returns that has something to say, as where the other waits for it in vain.
    The processes start with the first call, and anew with the next one after a call that failed or was not waited for.
    """
    pools: list[ProcessPoolExecutor] = []

    def run(function: Callable[..., Any], *args: Any, first: bool = False) -> list[Any]:
        if not pools:
            pools.extend(_started(count))
        usable = False
        try:
            waiting = [pool.submit(_fresh, function, rank, *args) for rank, pool in enumerate(pools)]
            if first:
                return [next(found for each in as_completed(waiting, 240) if (found := each.result()))]
            for each in as_completed(waiting, 240):
                each.result()  # the first error, not what it does to the others
            usable = True
            return [each.result() for each in waiting]
        finally:
            if not usable:
                _end(pools)

    try:
        yield run
    finally:
        _end(pools)


def _started(count: int) -> list[ProcessPoolExecutor]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    return [ProcessPoolExecutor(1, spawn, _begin, (rank, port, count)) for rank in range(count)]


def _end(pools: list[ProcessPoolExecutor]) -> None:
    """Ends the processes at once: one may wait for the other for ever."""
    for pool in pools:
        processes = list((pool._processes or {}).values())
        pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()
    pools.clear()


def _begin(rank: int, port: int, count: int) -> None:
    from cacompile.controller import policy

    torch.set_num_threads(1)
    policy.FAST = np.inf  # few steps at high rates suffice
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=count, timeout=timedelta(seconds=60))


def _fresh(function: Callable[..., Any], rank: int, *args: Any) -> Any:
    torch._dynamo.reset()
    torch.manual_seed(0)
    dist.barrier()
    return function(rank, *args)


def apart(model: nn.Module) -> float:
    """The largest difference between the ranks' weights."""
    mine = torch.cat([param.detach().flatten() for param in model.parameters()])
    each = [torch.empty_like(mine) for _ in range(RANKS)]
    dist.all_gather(each, mine)
    return float((each[0] - each[1]).abs().max())
