"""The truncated versions of one backward: each ends where all that lies below is frozen."""

from __future__ import annotations

import copy
import functools
import logging
import time
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
from .source import BackwardSource, Run, Version

log = logging.getLogger(__name__)

STALE = 1000
"""Backwards after which a version that has not run makes room for another."""

Key = tuple[frozenset[int], bool]
"""Places of the output that are None, and whether products are masked."""


class TruncatedVersions:
    """A small cache of versions, each compiled when first asked for.

    While it is full the nearest one serves, which computes more than is wanted; another is compiled when one of them
    has not run for long.
    """

    def __init__(self, source: BackwardSource, limit: int, device: torch.device) -> None:
        """limit: how many are kept; device: where the weights are."""
        self._device = device
        self._source = source
        self._limit = limit
        self._made: dict[Key, Version | None] = {}
        self._used: dict[Key, int] = {}
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
            if aside is not None and len(self._made) < self._limit:
                aside.start(key, functools.partial(self.find, places, plan))
                return self._nearest(key)
            with compile_lock:  # as for the masked version
                if key not in self._made and not self._make_room():
                    return self._nearest(key)
                if key not in self._made:
                    self._made[key] = self._make(places, plan)
        self._used[key] = self._clock
        return self._made[key]

    def _make_room(self) -> bool:
        if len(self._made) < self._limit:
            return True
        oldest = min(self._made, key=lambda key: self._used.get(key, 0), default=None)
        if oldest is None or self._clock - self._used.get(oldest, 0) < STALE:
            return False
        del self._made[oldest]
        return True

    def _nearest(self, wanted: Key) -> Version | None:
        places, masked = wanted
        made = list(self._made.items())  # a thread may add to it
        fit = [key for key, one in made if one is not None and key[0] <= places and key[1] is masked]
        if not fit:
            return None
        best = min(fit, key=lambda key: getattr(self._made[key], "nodes", 0))
        self._used[best] = self._clock
        return self._made[best]

    def _make(self, places: frozenset[int], plan: Plan | None) -> Version | None:
        """Never raises."""
        start = time.perf_counter()
        try:
            version = self._compiled(places, plan)
        except Broken as broken:
            log.warning("a truncated backward broke its promise, so all of it is computed: %s", broken)
            return None
        except Exception:
            log.warning("a truncated backward could not be made, so all of it is computed", exc_info=True)
            return None
        if version is not None:
            self._source.log.truncated(len(places), version.nodes, time.perf_counter() - start)
        return version

    def _compiled(self, places: frozenset[int], plan: Plan | None) -> Version | None:
        name = f"truncated {sorted(places)} {'masked' if plan is not None else 'dense'}"
        if (found := self._source.find(name)) is not None:
            run, facts = found
            host = bool(facts.masked) and plan is not None and MaskedMaker(self._source, plan, self._device).wants_host
            run = _with_fewer(run, facts.unread)
            return Version(run, frozenset(facts.masked), host, places, facts.nodes, frozenset(facts.unread.values()))
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
            self._source.save(name, code, VersionFacts(tuple(sorted(masked)), (), len(nodes), unread))
            run = _with_fewer(code, unread)
        return Version(run, masked, host, places, len(nodes), frozenset(unread.values()))


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
