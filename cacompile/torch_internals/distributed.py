"""Several processes: DistributedDataParallel, `fully_shard`, `Join`, ZeRO, and the store where ranks have met."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .lookup import resolve


def running_ddp() -> Any:
    """The DistributedDataParallel whose module runs forward now; None where there is none."""
    # one that nobody has made is not imported either: a dictionary is asked, and no process group
    module = sys.modules.get("torch.nn.parallel.distributed")
    wrapper = getattr(module, "DistributedDataParallel", None)
    return getattr(wrapper, "_active_ddp_module", None)


def group_store(group: Any) -> Any:
    """The key-value store that the ranks of a process group have met in."""
    return resolve("process_group_store")(group)


@dataclass(frozen=True)
class FullySharded:
    """A parameter that `fully_shard` has spread over ranks, and what is spread with it."""

    name: str
    param: Any
    """What optimizers step: a DTensor."""
    root: Any
    """One object for all that one root module has."""

    @property
    def all(self) -> list[tuple[str, Any]]:
        """Names and parameters of all that its root has, in the order of the modules."""
        each = (of for state in self.root.all_states for of in _fully_sharded(state))
        return [(of._param_fqn, of.sharded_param) for of in each]


@dataclass(frozen=True)
class ShardedParam:
    """A parameter of one call of `fully_shard`."""

    of: Any
    """What `fully_shard` keeps of it."""

    @property
    def param(self) -> Any:
        """What optimizers step: a DTensor, which loading a state may have replaced."""
        return self.of.sharded_param

    @property
    def piece(self) -> tuple[int, ...]:
        """Shape of what each rank has of it, padded to be the same on all."""
        return tuple(self.of.padded_sharded_param_size)


def wrap_reduce_scatters(module: Any, wrap: Callable[[Any, list[ShardedParam]], Any]) -> None:
    """Have a module's own call of `fully_shard` reduce by `wrap(what it has reduced by, its parameters in order)`."""
    state = resolve("module_states")[module]()
    for group in _groups_of(state):
        group._reduce_scatter_comm = wrap(group._reduce_scatter_comm, [ShardedParam(of) for of in group.fsdp_params])


def is_fsdp1(model: Any) -> bool:
    """Whether any part of a model is under FullyShardedDataParallel."""
    wrapper = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", ())
    return any(isinstance(module, wrapper) for module in model.modules())


def may_be_sharded() -> bool:
    """Whether anything in this process has asked for FSDP."""
    return "torch.distributed.fsdp" in sys.modules


def fully_sharded(param: Any) -> FullySharded | None:
    """What a parameter was gathered from for a forward pass of FSDP2; None for any other."""
    for reference in list(resolve("module_states").values()):
        state = reference()
        for of in _fully_sharded(state):
            if getattr(of, "_unsharded_param", None) is param:
                return FullySharded(of._param_fqn, of.sharded_param, state._state_ctx)
    return None


def _fully_sharded(state: Any) -> list[Any]:
    """What `fully_shard` keeps of each parameter of one call."""
    return [of for group in _groups_of(state) for of in group.fsdp_params]


def _groups_of(state: Any) -> list[Any]:
    """What is gathered and reduced together of one call of `fully_shard`."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # one a state before torch 2.13
        groups = [group] if (group := getattr(state, "_fsdp_param_group", None)) is not None else []
    return groups


@functools.cache
def follow_joins(joined: Callable[[Any], None], together: Callable[[Any, bool], None]) -> None:
    """Call `joined(ddp)` on a rank that has joined, for each forward pass of the others under `Join`, and
    `together(ddp, is_last_joiner)` on all ranks once all have."""
    hook = resolve("DDPJoinHook")
    main_hook, post_hook = hook.main_hook, hook.post_hook

    @functools.wraps(main_hook)
    def main(self: Any) -> None:
        joined(self.ddp)
        main_hook(self)

    @functools.wraps(post_hook)
    def post(self: Any, is_last_joiner: bool) -> None:
        post_hook(self, is_last_joiner)
        together(self.ddp, is_last_joiner)

    hook.main_hook, hook.post_hook = main, post


def joins(wrapper: Any) -> bool:
    """Whether a DistributedDataParallel runs under `Join`, where ranks run out of batches one by one."""
    return bool(getattr(getattr(wrapper, "_join_config", None), "enable", True))


def is_zero1(optimizer: Any) -> bool:
    """Whether it is a ZeroRedundancyOptimizer, within which each rank steps its own parameters: `optimizer.optim`."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)


def steps_within_backward(optimizer: Any) -> bool:
    """Whether it is one that steps as DistributedDataParallel reduces gradients, and whose own step does nothing."""
    return is_zero1(optimizer) and bool(getattr(optimizer, "_overlap_with_ddp", False))
