"""The truncated versions of one backward: each ends where all that lies below is frozen."""

from __future__ import annotations

import copy
import functools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from cacompile.passes.plan import Plan
from cacompile.passes.truncate import saves_more, truncate
from cacompile.passes.verify import Broken, verify_truncated
from cacompile.torch_internals import compile_lock

from .aside import Aside
from .facts import VersionFacts
from .masked import MaskedMaker
from .source import BackwardSource
from .version import Run, Version

log = logging.getLogger(__name__)

STALE = 1000
"""Backwards after which a version that has not run makes room for another."""

EARNED = 100
"""How often, twice a step, a version must have been asked for before it is compiled in the place of one in use."""

Key = tuple[frozenset[int], bool]
"""Places of the output that are None, and whether products are masked."""


class TruncatedVersions:
    """A small cache of versions, each compiled when first asked for.

    While it is full, one that a cache on disk holds takes the place of the one that has run least recently, and nothing
    is compiled again. One that is compiled must have been wanted often, or, where no cache holds what would go for it,
    must wait until that has not run for long. Until then the nearest one serves, which computes more than is wanted.
    """

    def __init__(self, source: BackwardSource, limit: int, device: torch.device) -> None:
        """limit: how many are held in memory; device: where the weights are."""
        self._device = device
        self._source = source
        self._limit = limit
        self._made: dict[Key, Version | None] = {}
        self._used: dict[Key, int] = {}
        self._wanted: Counter[Key] = Counter()
        """How often one was asked for that was not there."""
        self._stored: set[Key] = set()
        """Those that are known to be in the cache on disk."""
        self._saves: dict[tuple[frozenset[int], frozenset[int]], bool] = {}
        self._clock = 0

    def pays(self, places: frozenset[int], more: frozenset[int]) -> bool:
        """Whether dX goes where more outputs than these are None; dW of what is skipped costs nothing anyway."""
        key = places, more
        if key not in self._saves:
            self._saves[key] = saves_more(self._source.module.graph, places, more)
        return self._saves[key]

    def tick(self) -> None:
        """A backward runs."""
        self._clock += 1

    def find(self, places: frozenset[int], plan: Plan | None, aside: Aside | None = None) -> Version | None:
        """The version whose outputs in these places are None, or the nearest; None where the whole backward must run.

        plan: what is masked as well, if anything; aside: where one is compiled that is not there, if not here.
        """
        key = places, plan is not None
        if key not in self._made:
            self._wanted[key] += 1
            compiles = self._may_compile(key)
            if not compiles and key not in self._stored and self._wanted[key] > 1:
                return self._nearest(key)
            get = functools.partial(self._get, key, plan, compiles=compiles)
            if aside is not None:
                aside.start(key, get)
            else:
                get()
        if key not in self._made:
            return self._nearest(key)
        self._used[key] = self._clock
        return self._made.get(key)  # another thread may have taken it away since

    def again(self, places: frozenset[int]) -> Version:
        """The unmasked version that a forward has counted on, whatever was made in its place since."""
        key = places, False
        self._used[key] = self._clock
        version = self._made.get(key) or self._get(key, None, compiles=True)
        if version is None:
            raise RuntimeError("the backward for which a forward has saved what it reads cannot be compiled again")
        return version

    def _may_compile(self, key: Key) -> bool:
        """Whether there is room, or another may make room."""
        if not self._is_full:
            return True
        if self._clock - self._used.get(self._oldest, 0) >= STALE:
            return True
        return self._source.cache is not None and self._wanted[key] > EARNED

    @property
    def _is_full(self) -> bool:
        return sum(one is not None for one in list(self._made.values())) >= self._limit

    @property
    def _oldest(self) -> Key:
        """The one that has run least recently."""
        made = list(self._made.items())  # a thread may add to it
        return min((key for key, one in made if one is not None), key=lambda key: self._used.get(key, 0))

    def _get(self, key: Key, plan: Plan | None, *, compiles: bool) -> Version | None:
        """One that may not be there yet, loaded from the cache on disk, or else compiled if that is allowed."""
        with compile_lock:  # as for the masked version
            if key in self._made:
                return self._made[key]
            version = self._load(key, plan)
            if version is None:
                self._stored.discard(key)
                if not compiles:
                    return None
                version = self._make(key, plan)
            while version is not None and self._is_full:
                self._forget(self._oldest)
            self._made[key] = version
            self._used[key] = self._clock
            return version

    def _forget(self, key: Key) -> None:
        del self._made[key]
        self._used.pop(key, None)
        self._wanted[key] = 1  # it was looked for in the cache, and must be earned anew if it is not there

    def _nearest(self, wanted: Key) -> Version | None:
        places, masked = wanted
        made = list(self._made.items())  # a thread may change it
        fit = [(one.nodes, key, one) for key, one in made if one and key[0] <= places and key[1] is masked]
        if not fit:
            return None
        _, key, best = min(fit, key=lambda each: each[0])
        self._used[key] = self._clock
        return best

    def _load(self, key: Key, plan: Plan | None) -> Version | None:
        """Never raises."""
        if (found := self._source.find(_name(key))) is None:
            return None
        run, facts = found
        host = bool(facts.masked) and plan is not None and MaskedMaker(self._source, plan, self._device).wants_host
        self._stored.add(key)
        run = _with_fewer(run, facts.unread)
        return Version(run, frozenset(facts.masked), host, key[0], facts.nodes, frozenset(facts.unread.values()))

    def _make(self, key: Key, plan: Plan | None) -> Version | None:
        """Never raises."""
        start = time.perf_counter()
        try:
            version = self._compiled(key, plan)
        except Broken as broken:
            log.warning("a truncated backward broke its promise, so all of it is computed: %s", broken)
            return None
        except Exception:
            log.warning("a truncated backward could not be made, so all of it is computed", exc_info=True)
            return None
        if version is not None:
            self._source.log.truncated(len(key[0]), version.nodes, time.perf_counter() - start)
        return version

    def _compiled(self, key: Key, plan: Plan | None) -> Version | None:
        places, _ = key
        flags: Sequence[Any] = ()
        masked, host = frozenset[str](), False
        if plan is None:
            module = self._source.copy()
        else:
            maker = MaskedMaker(self._source, plan, self._device)
            masked, host, module = frozenset(maker.edit().masked or ()), maker.wants_host, maker.module
            flags = maker.fake_flags(plan.blocks) if masked else ()
        before = copy.deepcopy(module.graph)
        if not truncate(module, places):
            return None
        verify_truncated(before, module.graph, places)
        nodes = [node for node in module.graph.nodes if node.op not in ("placeholder", "output")]
        inputs = module.graph.find_nodes(op="placeholder")
        unread = {
            i: node.name for i, node in enumerate(inputs) if not node.users and isinstance(_value(node), torch.Tensor)
        }
        if not nodes and not any(value is not None for value in module.graph.output_node().args[0]):
            run = _nothing(len(module.graph.output_node().args[0]))
        else:
            for i in unread:
                module.graph.erase_node(inputs[i])
            module.recompile()
            code = self._source.compile(module, "truncated", flags, gone=tuple(unread))
            facts = VersionFacts(tuple(sorted(masked)), (), len(nodes), unread)
            if self._source.save(_name(key), code, facts):
                self._stored.add(key)
            run = _with_fewer(code, unread)
        return Version(run, masked, host, places, len(nodes), frozenset(unread.values()))


def _name(key: Key) -> str:
    places, masked = key
    return f"truncated {sorted(places)} {'masked' if masked else 'dense'}"


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _with_fewer(run: Run, gone: Iterable[int]) -> Run:
    """Called with all inputs of the graph, of which the version has not those in these positions."""
    positions = sorted(gone, reverse=True)

    def run_with_fewer(args: list[Any]) -> Any:
        for i in positions:
            del args[i]
        return run(args)

    return run_with_fewer


def _nothing(outputs: int) -> Callable[[list[Any]], Any]:
    """A backward that computes nothing at all."""

    def run(args: list[Any]) -> list[None]:
        args.clear()
        return [None] * outputs

    return run
