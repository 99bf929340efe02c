"""Several processes: DistributedDataParallel, `Join`, ZeRO, and the store in which a group's ranks have met."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from .contracts import resolve


def running_ddp() -> Any:
    """The DistributedDataParallel whose module runs forward now; None where there is none."""
    # one that nobody has made is not imported either: a dictionary is asked, and no process group
    module = sys.modules.get("torch.nn.parallel.distributed")
    wrapper = getattr(module, "DistributedDataParallel", None)
    return getattr(wrapper, "_active_ddp_module", None)


def group_store(group: Any) -> Any:
    """The key-value store that the ranks of a process group have met in."""
    return resolve("process_group_store")(group)


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


def is_zero1(optimizer: Any) -> bool:
    """Whether it is a ZeroRedundancyOptimizer, within which each rank steps its own parameters: `optimizer.optim`."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return module is not None and isinstance(optimizer, module.ZeroRedundancyOptimizer)
