"""The lean forwards of one graph: each saves no more than one truncated backward reads."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from cacompile.passes.truncate import truncate
from cacompile.passes.verify import Broken, verify_truncated
from cacompile.torch_internals import TracingContext, compile_lock, output_strides

from .aside import Aside
from .facts import LeanFacts, VersionFacts
from .handle import erase_handle, without_input
from .inner import Compile
from .log import CompileLog
from .source import BackwardSource, StoredSource, identity_of, plain_settings
from .version import Run, Version
from .version_cache import VersionCache

log = logging.getLogger(__name__)


class Cut(NamedTuple):
    """What a forward has left out, for the backward that follows on it: no other finds what it reads."""

    places: frozenset[int]
    """Of gradients that are None."""
    unread: frozenset[str]
    """Names of the inputs that the backward does not read."""


class LeanForwards:
    """Makes them when first asked for, out of the forward as it came; as many as there are truncated backwards.

    As with requires_grad=False, what is frozen when the forward runs decides: thawed before the backward, it still gets
    no gradient, as nothing was saved for one.
    """

    def __init__(self, source: BackwardSource, spared: dict[str, int], limit: int) -> None:
        """spared: see `LeanFacts`; limit: how many are held in memory."""
        self._source = source
        self._spared = spared
        self._limit = limit
        self._strides: list[tuple[str, ...] | None] | None = None
        """See `LeanFacts`; None while the whole forward is not compiled."""
        self._identity: str | None = None
        self._saved_at: int | None = None
        """Where the handle was among the outputs."""
        self._made: dict[frozenset[str], Run | None] = {}
        self._used: dict[frozenset[str], int] = {}
        self._clock = itertools.count()

    @classmethod
    def of(
        cls,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        settings: dict[str, Any],
        *,
        handle: int,
        compile_inner: Compile,
        compile_log: CompileLog,
        limit: int,
    ) -> LeanForwards:
        """Of a forward as it comes, before it is compiled, with our handle among its inputs."""
        source = BackwardSource(
            gm,
            [value for i, value in enumerate(inputs) if i != handle],
            without_input(settings, handle),
            donated=None,
            compile_inner=compile_inner,
            compile_log=compile_log,
        )
        self = cls(source, {}, limit)
        self._saved_at = erase_handle(source.module, handle)
        self._spared.update(spared_by(source.module.graph))
        return self

    @classmethod
    def load(
        cls,
        facts: LeanFacts,
        settings: dict[str, Any],
        *,
        compile_inner: Compile,
        compile_log: CompileLog,
        limit: int,
        cache: Callable[[str], VersionCache],
    ) -> LeanForwards:
        """Of a forward that another process has traced and compiled."""
        source = StoredSource(
            facts.source, settings, donated=None, compile_inner=compile_inner, compile_log=compile_log
        )
        self = cls(source, facts.spared, limit)
        self._strides = facts.strides
        self._keep_versions(facts.versions, cache)
        return self

    def compiled(self, whole: Any, cache: Callable[[str], VersionCache] | None) -> None:
        """The whole forward has just been compiled. cache: where others are kept, given a hash."""
        strides = output_strides(TracingContext.try_get())
        if strides and self._saved_at is not None:
            del strides[self._saved_at]
        self._strides = _shown(strides)
        if cache is not None and (identity := identity_of(self._source, whole, self._strides)) is not None:
            self._keep_versions(identity, cache)

    def _keep_versions(self, identity: str, cache: Callable[[str], VersionCache]) -> None:
        self._identity, self._source.cache = identity, cache(identity)

    def stored(self) -> LeanFacts | None:
        """What another process needs in order to go on from here; None where it cannot."""
        if self._identity is None or self._strides is None:
            return None
        try:
            content = self._source.stored()
        except Exception:
            log.debug("a forward cannot be pickled, so starts from the cache save all that it saves", exc_info=True)
            return None
        settings = plain_settings(self._source.settings)
        return LeanFacts(self._spared, self._strides, settings, content, self._identity)

    def find(self, backward: Version, aside: Aside | None = None) -> Cut | None:
        """The cut that a truncated backward makes; None where its forward would save nothing less, or cannot be made.

        aside: where a forward is compiled that is not there, if not here; None until then, too.
        """
        unread = backward.unread
        if unread not in self._made:
            if not self._places(unread):
                return None
            if aside is not None:
                aside.start(("lean", unread), functools.partial(self.run_for, unread))
                return None
        return None if self.run_for(unread) is None else Cut(backward.truncated, unread)

    def run_for(self, unread: frozenset[str]) -> Run | None:
        """The forward that does not save what is not read; None where it cannot be made."""
        self._used[unread] = next(self._clock)
        run = self._made.get(unread)
        if run is not None or unread in self._made:
            return run
        with compile_lock:
            if unread not in self._made:
                self._made[unread] = self._make(self._places(unread))
                # what goes is in the cache on disk, or its backward is gone as well
                for oldest in sorted(self._made, key=lambda each: self._used.get(each, 0))[: -self._limit]:
                    self._made.pop(oldest)
                    self._used.pop(oldest, None)
            return self._made.get(unread)

    def _places(self, unread: frozenset[str]) -> frozenset[int]:
        return frozenset(self._spared[name] for name in unread if name in self._spared)

    def _make(self, places: frozenset[int]) -> Run | None:
        """Never raises."""
        name = f"lean forward {sorted(places)}"
        if (found := self._source.find(name)) is not None:
            return _filled(found[0], places)
        try:
            module = self._source.copy()
            before = copy.deepcopy(module.graph)
            truncate(module, places)
            verify_truncated(before, module.graph, places)
            strides: list[Any] = []
            run = self._source.compile(module, "lean forward", strides=strides)
            if self._strides is None or not _agree(self._strides, _shown(strides)):
                log.info("a forward that saves less would lay out in another way what it saves: the whole one runs on")
                return None
        except Broken as broken:
            log.warning("a forward that saves less broke its promise, so all is saved: %s", broken)
            return None
        except Exception:
            log.warning("a forward that saves less could not be made, so all is saved", exc_info=True)
            return None
        self._source.log.lean(len(places))
        self._source.save(name, run, VersionFacts((), ()))
        return _filled(run, places)


def spared_by(graph: fx.Graph) -> dict[str, int]:
    """What a forward computes for nobody but its backward: the backward's input -> the place among its outputs.

    torch's partitioner calls an input of the backward as the node that is saved for it.
    """
    outputs = graph.output_node().args[0]
    return {
        node.name: place
        for place, node in enumerate(outputs)
        if isinstance(node, fx.Node) and node.op != "placeholder" and outputs.count(node) == 1
    }


def _shown(strides: Sequence[Any]) -> list[tuple[str, ...] | None]:
    """As they are compared, and pickled."""
    return [None if each is None else tuple(map(str, each)) for each in strides]


def _agree(whole: Sequence[Any], lean: Sequence[Any]) -> bool:
    """Whether what a lean forward saves lies in memory as the whole one's does: backwards are compiled for that.

    Both are empty of compilers that lay out tensors as the graph says.
    """
    return len(whole) == len(lean) and all(b is None or tuple(a or ()) == tuple(b) for a, b in zip(whole, lean))


def _filled(run: Run, places: frozenset[int]) -> Callable[[list[Any]], list[Any]]:
    """With something in the place of what is not saved, as autograd saves tensors only."""
    empty = torch.empty(0, device="cpu")

    def forward(args: list[Any]) -> list[Any]:
        results = list(run(args))
        for place in places:
            results[place] = empty
        return results

    return forward
