"""Sends less under `fully_shard` (FSDP2): a reduce-scatter that leaves out what all ranks skip."""

from __future__ import annotations

import logging
import math
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from cacompile.state.params import ParamState
from cacompile.state.registry import registry
from cacompile.torch_internals import (
    SCATTERS,
    SHARDS,
    ShardedParam,
    broken_contracts,
    warning_once,
    wrap_reduce_scatters,
)

from .traffic import LEAST, Traffic, numel, pack, slices_on, unpack

log = logging.getLogger(__name__)

MANY = 4096
"""Sums of sizes up to which it is looked for which parameters have no gradient."""


def scatter_less(root: nn.Module, traffic: Traffic) -> bool:
    """Have all that is under `fully_shard` in a module send less; False if nothing is."""
    sharded = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    modules = [module for module in root.modules() if isinstance(module, sharded)]
    if broken := [*broken_contracts(SHARDS), *broken_contracts(SCATTERS)] if modules else []:
        warning_once(log, "all gradients are sent: %s", "; ".join(map(str, broken)))
        return True
    for module in modules:
        wrap_reduce_scatters(module, lambda scatter, params: _ScatterLess(scatter, params, traffic))
    return bool(modules)


class _ScatterLess:
    """The reduce-scatter of one call of `fully_shard`: of all ranks' shards, one after the other, each gets its own.

    A shard holds what its rank has of each parameter that has a gradient, one after the other, flat; along dimension 0
    parameters are padded to as many rows on each rank.
    """

    def __init__(self, scatter: Any, params: Sequence[ShardedParam], traffic: Traffic) -> None:
        self._scatter, self._params, self._traffic = scatter, params, traffic

    def allocate(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._scatter.allocate(*args, **kwargs)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, op: Any, async_op: bool = False
    ) -> Any:
        ranks = group.size()
        present = [] if async_op else self._present(input_tensor.numel(), ranks)
        kept = [_kept(present, shard, rank) for rank, shard in enumerate(input_tensor.chunk(ranks)) if present]
        size = max(map(numel, kept), default=output_tensor.numel())
        self._traffic.dense += input_tensor.nbytes
        if size > (1.0 - LEAST) * output_tensor.numel():
            self._traffic.sent += input_tensor.nbytes
            return self._scatter(output_tensor, input_tensor, group, op, async_op)
        self._traffic.sent += ranks * size * input_tensor.itemsize
        output_tensor.zero_()  # a rank may have computed more than it had to
        if not size:
            return None
        packed, mine = (
            self.allocate((count,), dtype=input_tensor.dtype, device=input_tensor.device)
            for count in (ranks * size, size)
        )
        for views, part in zip(kept, packed.chunk(ranks)):
            pack(views, part)
            part[numel(views) :] = 0.0
        self._scatter(mine, packed, group, op, False)
        unpack(mine, _kept(present, output_tensor, group.rank()))
        return None

    def _present(self, total: int, ranks: int) -> list[ShardedParam]:
        """The parameters that have gradients, of `total` elements together; none where that is not certain."""
        sizes = [ranks * math.prod(param.piece) for param in self._params]
        if total == sum(sizes):
            return list(self._params)
        trained = [param.param.requires_grad and not _is_frozen(registry.find(param.param)) for param in self._params]
        absent = sum(size for size, has in zip(sizes, trained) if not has)
        if total != sum(sizes) - absent or not _only_one_way(sizes, absent):
            return []
        return [param for param, has in zip(self._params, trained) if has]


def _is_frozen(state: ParamState | None) -> bool:
    return state is not None and state.is_frozen


def _only_one_way(sizes: Sequence[int], total: int) -> bool:
    """Whether only one choice of sizes has this sum. False where there are too many to look."""
    ways = Counter({0: 1})
    for size in sizes:
        ways += Counter({before + size: count for before, count in ways.items() if before + size <= total})
        if len(ways) > MANY:
            return False
    return ways[total] == 1


def _kept(params: Sequence[ShardedParam], shard: torch.Tensor, rank: int) -> list[torch.Tensor]:
    """Views of what is on, on all ranks, of a rank's shard. shard: flat."""
    parts = shard.split([math.prod(param.piece) for param in params])
    return [view for param, part in zip(params, parts) for view in _needed(param, part.view(param.piece), rank)]


def _needed(param: ShardedParam, piece: torch.Tensor, rank: int) -> Iterator[torch.Tensor]:
    state = registry.find(param.param)
    if state is None or state.replicas is None or state.partition is None or state.shard is None or state.is_frozen:
        yield piece
        return
    dim, rows = state.shard.dim, state.partition.rows
    first = rank * param.piece[dim]
    within = (first, min(first + param.piece[dim], rows)) if state.partition.dim == dim else None
    yield from slices_on(state, piece, within)
