"""Replicas: the ranks that DistributedDataParallel keeps equal, and the parameters that they hold copies of."""

from __future__ import annotations

import logging
import weakref
import zlib
from collections import Counter
from typing import TYPE_CHECKING, Any

from torch import distributed as dist

from cacompile.torch_internals import RANKS, broken_contracts, group_store, running_ddp, warning_once

from .params import registry

if TYPE_CHECKING:
    from .params import ParamState

log = logging.getLogger(__name__)

_by_wrapper: weakref.WeakKeyDictionary[Any, Replicas] = weakref.WeakKeyDictionary()
_alike: Counter[tuple[Any, ...]] = Counter()


class Replicas:
    """One DistributedDataParallel's parameters on all ranks of its group, under the names of the module in it.

    Ranks tell each other things through the store of the process group. That is no collective: it cannot come out of
    order with those of the user, and a rank that does not take part holds up nobody but who asks it for an answer.
    """

    def __init__(self, wrapper: Any) -> None:
        group = wrapper.process_group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.params: list[ParamState] = []
        """In the order of the model."""
        left_out = set(wrapper.parameters_to_ignore)
        shapes = []
        for place, (name, param) in enumerate(wrapper.module.named_parameters()):
            if param.requires_grad and name not in left_out:
                state = registry.track(param, name.replace("_orig_mod.", ""))
                if state.replicas is None:
                    state.join(self, place, name.replace("_orig_mod.", ""))
                self.params.append(state)
                shapes.append((place, tuple(param.shape), str(param.dtype)))
        # names may differ and are compared by those who meet; what differs in shape does not meet
        alike = group.group_name, self.rank, zlib.crc32(repr(shapes).encode())
        if broken := broken_contracts(RANKS):
            reasons = "; ".join(map(str, broken))
            warning_once(log, "ranks cannot agree on what to skip, and compute everything: %s", reasons)
        store = dist.HashStore() if broken else group_store(group)
        self.store = dist.PrefixStore(f"cacompile/{alike[0]}/{alike[2]}/{_alike[alike]}", store)
        _alike[alike] += 1
        self.agreements: weakref.WeakSet[Any] = weakref.WeakSet()
        """What is agreed on for them, of each optimizer."""
        self.names: Counter[str] = Counter()
        """How many agreements have been made under a name."""


def find_replicas() -> bool:
    """See which ranks train the parameters of the graph that runs now; whether there are any others.

    Known while DistributedDataParallel runs its module forward, which it does before it first reduces a gradient.
    """
    wrapper = running_ddp()
    if wrapper is None or dist.get_world_size(wrapper.process_group) < 2:
        return False
    if wrapper not in _by_wrapper:
        _by_wrapper[wrapper] = Replicas(wrapper)
    return True


def agreements_of(wrapper: Any) -> list[Any]:
    """What is agreed on for parameters that a DistributedDataParallel keeps equal, maybe since an earlier one did."""
    states = (registry.find(param) for param in wrapper.parameters())
    found = {state.replicas: None for state in states if state is not None and state.replicas is not None}
    return [agreement for replicas in found for agreement in replicas.agreements]


def can_agree() -> bool:
    """Whether ranks can agree on this torch; where not, they compute everything."""
    return not broken_contracts(RANKS)
