"""Processes that train together over gloo, each of which runs what a test hands it."""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import distributed as dist
from torch import nn

RANKS = 2

OPTIONS = {"warmup_steps": 2, "monitor_every": 2, "tolerance": 0.5, "block_rows": 16, "inner": "aot_eager"}


@contextmanager
def some_ranks(count: int = RANKS) -> Iterator[Callable[..., list[Any]]]:
    """run(function, *args): calls function(rank, *args) in all processes at once; what they return, by rank.

    first: only what the first one returns that has something to say, as where the other waits for it in vain.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    pools = [ProcessPoolExecutor(1, spawn, _begin, (rank, port, count)) for rank in range(count)]

    def run(function: Callable[..., Any], *args: Any, first: bool = False) -> list[Any]:
        waiting = [pool.submit(_fresh, function, rank, *args) for rank, pool in enumerate(pools)]
        if first:
            return [next(found for each in as_completed(waiting, 240) if (found := each.result()))]
        return [each.result(timeout=240) for each in waiting]

    try:
        yield run
    finally:
        for pool in pools:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list((pool._processes or {}).values()):
                process.kill()  # one may wait for the other for ever


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
