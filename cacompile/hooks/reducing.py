"""Sends less: gradients that all ranks skip are left out, of DistributedDataParallel's all-reduces here."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cacompile.errors import ConvAwareError
from cacompile.state.params import ParamState
from cacompile.state.registry import registry
from cacompile.torch_internals import joins

from .scattering import scatter_less
from .traffic import LEAST, Traffic, numel, pack, slices_on, unpack


def reduce_less(wrapper: nn.Module) -> Traffic:
    """Have gradients averaged but for slices that all ranks skip or have frozen: those are zeros on each of them.

    For a DistributedDataParallel a communication hook, of which it can have only one; for a module under `fully_shard`
    (FSDP2) a reduce-scatter around the one that it and the modules within it have, as `set_custom_reduce_scatter` sets
    it. Call it once, on all ranks, before the first backward. What is left is summed as ever, so with everything
    computed nothing changes. Freeze and thaw at the same steps on all ranks. Under `Join` everything is sent.
    Returns a count that goes on with training. Raises ConvAwareError for anything else.
    """
    traffic = Traffic()
    if not isinstance(wrapper, DistributedDataParallel):
        if not scatter_less(wrapper, traffic):
            kind = type(wrapper).__name__
            raise ConvAwareError(f"wrapper must be a DistributedDataParallel, or under fully_shard (FSDP2), got {kind}")
        return traffic
    itself = weakref.ref(wrapper)

    def hook(state, bucket):  # type: ignore[no-untyped-def]  # torch compares annotations, and takes no texts
        return _reduce(itself(), traffic, bucket)

    wrapper.register_comm_hook(None, hook)
    return traffic


def _reduce(ddp: DistributedDataParallel | None, traffic: Traffic, bucket: Any) -> torch.futures.Future[torch.Tensor]:
    buffer = bucket.buffer()
    kept = None if ddp is None or joins(ddp) else _kept(bucket)
    packed = buffer
    if kept is not None:
        packed = buffer.new_empty(numel(kept))
        pack(kept, packed)
    traffic.dense += buffer.nbytes
    traffic.sent += packed.nbytes
    group = None if ddp is None else ddp.process_group
    packed.div_(dist.get_world_size(group))

    def put_back(future: Any) -> torch.Tensor:
        if kept is not None:
            (packed,) = future.value()
            buffer.zero_()  # a rank may have computed more than it had to
            unpack(packed, kept)
        return buffer

    if not packed.numel():
        done: Any = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        done.set_result(buffer.zero_())
        return done
    return dist.all_reduce(packed, group=group, async_op=True).get_future().then(put_back)


def _kept(bucket: Any) -> list[torch.Tensor] | None:
    """What of a bucket's gradients has to be sent; None: all of it, or nearly so."""
    views = [
        view
        for param, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
        for view in _needed(registry.find(param), _laid_out(gradient, param))
    ]
    whole = bucket.buffer().numel()
    return views if numel(views) <= (1.0 - LEAST) * whole else None


def _laid_out(gradient: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """A gradient as its bucket has it: elements lie as the parameter's do, such as of convolutions in channels_last.

    torch hands it over in the parameter's shape, but as if it were contiguous.
    """
    order = sorted(range(param.ndim), key=param.stride, reverse=True)
    if param.is_contiguous() or not param.permute(order).is_contiguous():  # with gaps, it is contiguous in the bucket
        return gradient
    return gradient.as_strided(param.shape, param.stride())


def _needed(state: ParamState | None, gradient: torch.Tensor) -> Iterator[torch.Tensor]:
    """The slices of a gradient that are on, on all ranks."""
    if state is None or state.replicas is None:
        yield gradient
    elif state.is_frozen:
        return
    elif state.partition is None:
        yield gradient
    else:
        yield from slices_on(state, gradient)
