"""Clips gradients by the norm that a dense run would have.

Until the optimizer's step a skipped slice is zero, so the norm of what is there comes out too small and clipping too
weak. While something is skipped, the norm that `torch.nn.utils.clip_grad_norm_` and `get_total_norm` give is

    (sum of |computed slice|^p + sum of |skipped slice|^p as expected)^(1/p)         (inf: the greatest of them)

Expected of a skipped group is its usual share times the level of this clip: what the computed groups have over their
shares. So a batch that makes all gradients great is noticed. A share is a running mean, over the clips at which the
group was computed, of what it had over their level; a group that never was has, per element, what its parameter's
computed groups have now.

The skipped slices themselves are overwritten by their estimate at the optimizer's step. That is a mean of gradients
that have been clipped already, so it must not be scaled down again, and is not. `clip_grad_value_` looks at each
element by itself and needs no help.

With nothing skipped it is the very same call and costs looking through the states of parameters. Else it takes one
more reduction of each gradient that has groups, and waits for no device. Left alone: DTensors, orders that are not
above zero, calls inside compiled graphs and CUDA graphs, and norms that are taken in other ways, such as FSDP's own
method's. What `fully_shard` has spread over ranks counts on each for the rows that it holds.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad

from cacompile.state.measurements import NormShares
from cacompile.state.params import ParamState
from cacompile.state.registry import registry
from cacompile.state.shards import local, over_shards, with_replicas
from cacompile.torch_internals import replace_total_norm, warning_once

log = logging.getLogger(__name__)

NEWEST = 0.5
"""Weight of the newest clip in a group's share."""


Part = tuple[ParamState, Tensor, NormShares]
"""A parameter's state, its gradient, and the shares of its groups."""


@torch.no_grad()
def missing_norm(grads: Sequence[Any], order: float) -> Tensor | None:
    """p-norm that is expected of the skipped slices of these gradients: a scalar on the first one's device.

    Of shards, what lies on this rank. None if nothing of them is skipped, or if they cannot be judged. Takes in what
    the computed groups have.
    """
    found = _find(grads)
    if not any(state.skipped.any() for state, _ in found) or not order > 0.0:
        return None
    found = [(state, grad if state.shard is None else local(grad)) for state, grad in found]
    if any(type(grad) is not Tensor or grad.layout is not torch.strided for _, grad in found):
        return None
    by_device: dict[torch.device, list[Part]] = {}
    for state, grad in found:
        by_device.setdefault(grad.device, []).append((state, grad, _norm_shares_of(state, order, grad.device)))
    missing = [_missing_on(device, parts, order).to(local(grads[0]).device) for device, parts in by_device.items()]
    return missing[0] if len(missing) == 1 else torch.linalg.vector_norm(torch.stack(missing), order)


def _find(grads: Sequence[Any]) -> list[tuple[ParamState, Any]]:
    """Those that are gradients of parameters with groups; none at all while none of these skips anything.

    Whatever other models do, which need not live as long on all ranks.
    """
    states = registry.all()
    if not any(state.skipped.any() for state in states):
        return []
    params = ((state, state.param) for state in states if state.blocks)
    owners = {id(param.grad): state for state, param in params if param is not None and param.grad is not None}
    found = [(owners[id(grad)], grad) for grad in grads if id(grad) in owners]
    return found if any(state.skipped.any() for state, _ in found) else []


def _norm_shares_of(state: ParamState, order: float, device: torch.device) -> NormShares:
    norm_shares = state.norm_shares
    if norm_shares is None or norm_shares.order != order:
        nothing = torch.full((state.blocks,), torch.nan, dtype=torch.float32, device=device)
        norm_shares = state.norm_shares = NormShares(order, nothing, np.zeros(state.blocks, bool))
    norm_shares.values = norm_shares.values.to(device)
    return norm_shares


def _missing_on(device: torch.device, parts: list[Part], order: float) -> Tensor:
    blocks = [state.blocks for state, _, _ in parts]
    now = torch.cat([_norms(state, grad, order) for state, grad, _ in parts])
    now = now if order == torch.inf else now.pow(order)
    off = _send(np.concatenate([state.skipped for state, _, _ in parts]), device)
    share = torch.cat([norm_shares.values for _, _, norm_shares in parts])
    read = ~off & now.isfinite()
    both = read & ~share.isnan()
    level = _sum(now, both) / _sum(share, both)
    level = torch.where(level.isfinite(), level, 1.0)  # the first clip, or the first of these groups
    expected = share * level
    each = zip(parts, expected.split(blocks), now.split(blocks), read.split(blocks))
    for (state, grad, norm_shares), of, now_of, read_of in each:
        if not norm_shares.known[state.skipped].all():
            of.copy_(_with_unknown(state, grad, order, of, now_of, read_of))
    fresh = now / level
    mixed = torch.where(share.isnan(), fresh, NEWEST * fresh + (1.0 - NEWEST) * share)
    # a level of zero, as of an output that is not used, says nothing
    share = torch.where(read & fresh.isfinite(), mixed, share)
    for (state, _, norm_shares), values in zip(parts, share.split(blocks)):
        norm_shares.values, norm_shares.known = values, norm_shares.known | ~state.skipped
    if order == torch.inf:
        return torch.where(off, expected, 0.0).nan_to_num(0.0, 0.0, 0.0).max()
    # part of a skipped slice may have been computed all the same, and is in the norm already
    more = torch.where(off, expected - now, 0.0).nan_to_num(0.0, 0.0, 0.0).sum()
    return more.clamp(min=0.0).pow(1.0 / order)


def _with_unknown(state: ParamState, grad: Tensor, order: float, expected: Tensor, now: Tensor, read: Tensor) -> Tensor:
    """`expected`, with what the parameter's computed groups have per element where nothing is known."""
    assert state.partition is not None
    block, (first, last) = state.partition.block, state.held
    starts = np.arange(state.blocks) * block
    rows = np.clip(np.minimum(starts + block, last) - np.maximum(starts, first), 0, None)
    sizes = (grad.numel() / max(1, last - first) * rows).astype(np.float32)
    size = _send(np.ones_like(sizes) if order == torch.inf else sizes, grad.device)
    return torch.where(expected.isnan(), size * (_sum(now, read) / _sum(size, read)), expected)


def _norms(state: ParamState, grad: Tensor, order: float) -> Tensor:
    """p-norm of each block, of what lies on this rank: float32 [blocks]."""
    assert state.partition is not None
    dim, block, (first, last) = state.partition.dim, state.partition.block, state.held
    around = first, state.blocks * block - last
    if not any(around):
        grad = grad.unflatten(dim, (state.blocks, block))
    others = [d for d in range(grad.dim()) if d != dim]
    dtype = torch.promote_types(grad.dtype, torch.float32)
    norms = torch.linalg.vector_norm(grad, order, others, dtype=dtype) if others else grad.abs()
    if any(around):
        norms = torch.linalg.vector_norm(torch.nn.functional.pad(norms, around).view(-1, block), order, 1)
    return norms.float()


def _sum(values: Tensor, chosen: Tensor) -> Tensor:
    return torch.where(chosen, values, 0.0).sum()


def _send(values: np.ndarray, device: torch.device) -> Tensor:
    host = torch.from_numpy(values)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def _followed(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(plain)
    def get_total_norm(tensors: Any, norm_type: float = 2.0, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return plain(tensors, norm_type, *args, **kwargs)
        tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
        total = plain(tensors, norm_type, *args, **kwargs)
        try:
            if _captured():
                return total
            if type(total) is not Tensor:
                return _of_shards(total, tensors, float(norm_type))
            missing = missing_norm(tensors, float(norm_type))
            return total if missing is None else _both(total, missing, float(norm_type))
        except Exception:
            warning_once(log, "the norm of gradients is taken without what is skipped of them", exc_info=True)
            return total

    return get_total_norm


@torch.no_grad()
def _both(total: Tensor, missing: Tensor, order: float) -> Tensor:
    dtype = torch.promote_types(total.dtype, torch.float32)
    return torch.linalg.vector_norm(torch.stack([total.to(dtype), missing.to(dtype)]), order).to(total.dtype)


@torch.no_grad()
def _of_shards(total: Any, grads: Sequence[Any], order: float) -> Any:
    """The norm with what is missing on all ranks, which is asked of them: here, as where torch sums up its own part.

    What is skipped follows from the mask, so all ranks come here or none; what fails on one counts nothing.
    """
    sharded = next((state.param for state, _ in _find(grads) if state.shard is not None and state.replicas), None)
    if sharded is None or not order > 0.0:
        return total
    try:
        missing = missing_norm(grads, order)
    except Exception:
        missing = None
        warning_once(log, "the norm of gradients is taken without what is skipped of them", exc_info=True)
    mine = torch.zeros((), device=local(total).device) if missing is None else missing
    if order == torch.inf:
        return with_replicas(total, lambda norm: _both(norm, over_shards(sharded, mine, "max"), order))
    summed = over_shards(sharded, mine.pow(order), "sum").pow(1.0 / order)
    return with_replicas(total, lambda norm: _both(norm, summed, order))


def _captured() -> bool:
    """Whether the user is recording this step into a CUDA graph, which must not hold a copy from the host."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


@functools.cache
def follow_clipping() -> None:
    """Let torch's clipping take its norm from here, once; it acts only while something is skipped.

    `clip_grad_norm_` looks its norm up in its module, so whoever has imported it before is followed as well. In a torch
    where it does not, it is made anew of the public functions, and earlier imports of it clip as they did.
    """
    utils: Any = torch.nn.utils
    utils.get_total_norm = norm = _followed(utils.get_total_norm)
    if replace_total_norm(norm):
        return

    @functools.wraps(utils.clip_grad_norm_)
    def clip_grad_norm_(
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        grads = [param.grad for param in parameters if param.grad is not None]
        total = norm(grads, norm_type, error_if_nonfinite, foreach)
        utils.clip_grads_with_norm_(parameters, max_norm, total, foreach)
        return total

    utils.clip_grad_norm_ = clip_grad.clip_grad_norm_ = clip_grad_norm_
