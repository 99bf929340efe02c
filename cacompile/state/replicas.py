"""Replicas: the ranks that train the same parameters, as copies that DistributedDataParallel keeps equal, or shards.

Of shards that graphs compute with as they are, each rank has rows of its own, and all decide together on those of all.
"""

from __future__ import annotations

import logging
import os
import weakref
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from torch import distributed as dist

from cacompile.torch_internals import (
    RANKS,
    broken_contracts,
    fully_sharded,
    group_store,
    running_ddp,
    warning_once,
)

from .registry import registry
from .shards import Shard, has_share, stepped

log = logging.getLogger(__name__)

Named = Iterable[tuple[int, str, Any]]

_by_wrapper: weakref.WeakKeyDictionary[Any, list[Replicas]] = weakref.WeakKeyDictionary()
"""By a DistributedDataParallel, or by what all share that one root of `fully_shard` has."""
_by_ranks: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Replicas]] = weakref.WeakKeyDictionary()
"""By the process group of all, and those of its ranks that have shares of the same."""
_alike: Counter[tuple[Any, ...]] = Counter()


class Replicas:
    """Parameters of which all ranks of a group skip the same, under the names that one module has for them.

    Ranks tell each other things through the store of the process group. That is no collective: it cannot come out of
    order with those of the user, and a rank that does not take part holds up nobody but who asks it for an answer.
    """

    def __init__(self, meeting: str, rank: int, size: int, store: dist.Store, named: Named) -> None:
        """meeting: what this group of ranks is called on all of them; named: place among all parameters, name, each."""
        self.rank, self.size = rank, size
        self.places = 0
        """Of a group that grows, how many have come; 0 for one that has known all from the start."""
        shapes = []
        for place, name, param in named:
            state = registry.track(param, name)
            if state.replicas is None:
                state.join(self, place, name)
            shapes.append((place, tuple(param.shape), str(param.dtype)))
        # names may differ and are compared by those who meet; what differs in shape does not meet
        alike = meeting, rank, zlib.crc32(repr(shapes).encode())
        if broken := broken_contracts(RANKS):
            reasons = "; ".join(map(str, broken))
            warning_once(log, "ranks cannot agree on what to skip, and compute everything: %s", reasons)
        self.store = dist.PrefixStore(f"cacompile/{alike[0]}/{alike[2]}/{_alike[alike]}", store)
        _alike[alike] += 1
        self.agreements: weakref.WeakSet[Any] = weakref.WeakSet()
        """What is agreed on for them, of each optimizer."""
        self.apart = False
        """Whether it was said, once for all optimizers, that weights differ."""
        self.names: Counter[str] = Counter()
        """How many agreements have been made under a name."""

    @classmethod
    def of_ddp(cls, wrapper: Any) -> Replicas:
        """What a DistributedDataParallel keeps equal."""
        group, left_out = wrapper.process_group, set(wrapper.parameters_to_ignore)
        every = (
            (name, None if name in left_out or hasattr(param, "to_local") else param)
            for name, param in wrapper.module.named_parameters()
        )
        return cls(group.group_name, dist.get_rank(group), dist.get_world_size(group), _store(group), _trained(every))

    @classmethod
    def of_shards(cls, every: Iterable[tuple[str, Any]]) -> list[Replicas]:
        """What `fully_shard` has spread, for each mesh of ranks that it lies on. every: name and sharded parameter."""
        by_mesh: dict[tuple[int, ...], list[tuple[int, str, Any]]] = {}
        for place, name, param in _trained(every):
            ranks = tuple(param.device_mesh.mesh.flatten().tolist())
            if len(ranks) > 1 and Shard.of(param) is not None:
                by_mesh.setdefault(ranks, []).append((place, name, param))
        store = _store(dist.group.WORLD)
        return [
            cls(f"ranks/{zlib.crc32(repr(ranks).encode())}", ranks.index(dist.get_rank()), len(ranks), store, named)
            for ranks, named in by_mesh.items()
        ]

    @classmethod
    def of_shares(cls, ranks: tuple[int, ...]) -> Replicas:
        """What graphs have this rank's share of, on these ranks; parameters come to it as they are met."""
        meeting = f"shares/{zlib.crc32(repr(ranks).encode())}"
        return cls(meeting, ranks.index(dist.get_rank()), len(ranks), _store(dist.group.WORLD), ())

    def add(self, param: Any, name: str) -> None:
        """One more that is met: in the same order on all ranks, whose graphs wait for each other."""
        state = registry.track(param, name)
        if state.replicas is None:
            state.join(self, self.places, name)
            self.places += 1


def _trained(every: Iterable[tuple[str, Any]]) -> Iterator[tuple[int, str, Any]]:
    for place, (name, param) in enumerate(every):
        if param is not None and param.requires_grad:
            yield place, name.replace("_orig_mod.", ""), param


def _store(group: Any) -> dist.Store:
    """The store of a process group; processes that torchelastic has restarted do not see what was said before."""
    if broken_contracts(RANKS):
        return dist.HashStore()
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", group_store(group))


def find_replicas(inputs: Iterable[Any] = ()) -> bool:
    """See which ranks train the parameters of the graph that runs now; whether there are any others.

    Known while DistributedDataParallel runs its module forward, which it does before it first reduces a gradient, or
    by the graph's inputs, of which `fully_shard` knows what they were gathered from.
    """
    wrapper = running_ddp()
    if wrapper is not None and dist.get_world_size(wrapper.process_group) > 1:
        if wrapper not in _by_wrapper:
            _by_wrapper[wrapper] = [Replicas.of_ddp(wrapper)]
        return True
    found = next((of for value in inputs if stepped(value) is not None and (of := fully_sharded(value))), None)
    if found is None:
        return False
    if found.root not in _by_wrapper:
        _by_wrapper[found.root] = Replicas.of_shards(found.all)
    return True


def join_shares(named: Iterable[tuple[str, Any]]) -> bool:
    """Have the ranks agree on parameters that each has a share of; whether there are any. named: as the graph does."""
    shared = [(name, param) for name, param in named if has_share(param) and param.device_mesh.size() > 1]
    for name, param in shared:
        ranks = tuple(param.device_mesh.mesh.flatten().tolist())
        known = _by_ranks.setdefault(dist.group.WORLD, {})
        if ranks not in known:
            known[ranks] = Replicas.of_shares(ranks)
        known[ranks].add(param, name)
    return bool(shared)


def agreements_of(wrapper: Any) -> list[Any]:
    """What is agreed on for parameters that a DistributedDataParallel keeps equal, maybe since an earlier one did."""
    states = (registry.find(param) for param in wrapper.parameters())
    found = {state.replicas: None for state in states if state is not None and state.replicas is not None}
    return [agreement for replicas in found for agreement in replicas.agreements]


def can_agree() -> bool:
    """Whether ranks can agree on this torch; where not, they compute everything."""
    return not broken_contracts(RANKS)
