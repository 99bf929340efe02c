"""Sends less: an all-reduce for DistributedDataParallel that leaves out what all ranks skip."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from cacompile.errors import ConvAwareError
from cacompile.state.params import ParamState
from cacompile.state.registry import registry
from cacompile.torch_internals import joins

LEAST = 0.125
"""Share of a bucket from which on it is worth copying the rest together."""


@dataclass
class Traffic:
    """Bytes of gradients that this rank has handed to all-reduces."""

    dense: int = 0
    """What it would have been with everything computed."""
    sent: int = 0

    def __str__(self) -> str:
        share = self.sent / self.dense if self.dense else 1.0
        return f"{self.sent:.3g} of {self.dense:.3g} bytes of gradients sent ({share:.1%})"


def reduce_less(wrapper: DistributedDataParallel) -> Traffic:
    """Have gradients averaged but for slices that all ranks skip or have frozen: those are zeros on each of them.

    A communication hook, the only one that a DistributedDataParallel can have; call it once, on all ranks, before the
    first backward. What is left is summed as ever, so with everything computed nothing changes. Freeze and thaw at the
    same steps on all ranks. Under `Join` everything is sent. Returns a count that goes on with training.
    Raises ConvAwareError for anything but a DistributedDataParallel.
    """
    if not isinstance(wrapper, DistributedDataParallel):
        raise ConvAwareError(f"wrapper must be a DistributedDataParallel, got {type(wrapper).__name__}")
    traffic = Traffic()
    itself = weakref.ref(wrapper)

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, and takes no texts
        return _reduce(itself(), traffic, bucket)

    wrapper.register_comm_hook(None, hook)
    return traffic


def _reduce(ddp: DistributedDataParallel | None, traffic: Traffic, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    buffer = bucket.buffer()
    kept = None if ddp is None or joins(ddp) else _kept(bucket)
    packed = buffer if kept is None else _pack(kept, buffer)
    traffic.dense += buffer.nbytes
    traffic.sent += packed.nbytes
    group = None if ddp is None else ddp.process_group
    packed.div_(dist.get_world_size(group))

    def unpack(future: Any) -> torch.Tensor:
        if kept is not None:
            (packed,) = future.value()
            buffer.zero_()  # a rank may have computed more than it had to
            for view, part in zip(kept, packed.split([view.numel() for view in kept])):
                view.copy_(part.view(view.shape))
        return buffer

    if not packed.numel():
        done: Any = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        done.set_result(buffer.zero_())
        return done
    return dist.all_reduce(packed, group=group, async_op=True).get_future().then(unpack)


def _pack(views: list[torch.Tensor], buffer: torch.Tensor) -> torch.Tensor:
    return torch.cat([view.reshape(-1) for view in views]) if views else buffer.new_empty(0)


def _kept(bucket: Any) -> list[torch.Tensor] | None:
    """What of a bucket's gradients has to be sent; None: all of it, or nearly so."""
    views = [
        view
        for param, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
        for view in _needed(registry.find(param), gradient)
    ]
    whole = bucket.buffer().numel()
    return views if sum(math.prod(view.shape) for view in views) <= (1.0 - LEAST) * whole else None


def _needed(state: ParamState | None, gradient: torch.Tensor) -> Iterator[torch.Tensor]:
    """The slices of a gradient that are on, on all ranks."""
    if state is None or state.replicas is None:
        yield gradient
    elif state.is_frozen:
        return
    elif state.partition is None:
        yield gradient
    else:
        on = state.column("agreed") & ~state.frozen_blocks
        for start, length in state.partition.spans(on):
            yield gradient.narrow(state.partition.dim, start, length)
