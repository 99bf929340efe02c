"""The lean forwards of one graph: each saves no more than one truncated backward reads."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from cacompile.passes.truncate import truncate
from cacompile.passes.verify import Broken, verify_truncated
from cacompile.torch_internals import TracingContext, compile_lock, output_strides

from .aside import Aside
from .handle import erase_handle, without_input
from .inner import Compile
from .log import CompileLog
from .source import BackwardSource, Run, Version

log = logging.getLogger(__name__)


class Cut(NamedTuple):
    """A forward, and the backward that must follow on it: no other finds what it reads."""

    forward: Run
    backward: Version


class LeanForwards:
    """Makes them when first asked for, out of the forward as it came; as many as there are truncated backwards.

    As with requires_grad=False, what is frozen when the forward runs decides: thawed before the backward, it still gets
    no gradient, as nothing was saved for one.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        settings: dict[str, Any],
        *,
        handle: int,
        compile_inner: Compile,
        compile_log: CompileLog,
    ) -> None:
        """The forward as it comes, before it is compiled, with our handle among its inputs."""
        self._source = BackwardSource(
            gm,
            [value for i, value in enumerate(inputs) if i != handle],
            without_input(settings, handle),
            donated=None,
            compile_inner=compile_inner,
            compile_log=compile_log,
        )
        self._saved_at = erase_handle(self._source.module, handle)
        self._strides: list[Any] | None = None
        """Of the whole forward's outputs, for which backwards are compiled; None while it is not compiled."""
        self._made: dict[frozenset[str], Run | None] = {}

    def compiled(self) -> None:
        """The whole forward has just been compiled."""
        self._strides = output_strides(TracingContext.try_get())
        if self._strides and self._saved_at is not None:
            del self._strides[self._saved_at]

    def find(self, backward: Version, aside: Aside | None = None) -> Cut | None:
        """The forward for a truncated backward; None where it would save nothing less, or cannot be made.

        aside: where one is compiled that is not there, if not here; None until then, too.
        """
        unread = backward.unread
        if unread not in self._made:
            if aside is not None:
                aside.start(("lean", unread), functools.partial(self.find, backward))
                return None
            with compile_lock:
                if unread not in self._made:
                    self._made[unread] = self._make(unread)
        forward = self._made[unread]
        return None if forward is None else Cut(forward, backward)

    def _make(self, unread: frozenset[str]) -> Run | None:
        """Never raises."""
        places = saved_for(self._source.module.graph, unread)
        if not places:
            return None
        try:
            module = self._source.copy()
            before = copy.deepcopy(module.graph)
            truncate(module, places)
            verify_truncated(before, module.graph, places)
            strides: list[Any] = []
            run = self._source.compile(module, "lean forward", strides=strides)
            if self._strides is None or not _agree(self._strides, strides):
                log.info("a forward that saves less would lay out in another way what it saves: the whole one runs on")
                return None
        except Broken as broken:
            log.warning("a forward that saves less broke its promise, so all is saved: %s", broken)
            return None
        except Exception:
            log.warning("a forward that saves less could not be made, so all is saved", exc_info=True)
            return None
        self._source.log.lean(len(places))
        return _filled(run, places)


def saved_for(graph: fx.Graph, names: frozenset[str]) -> frozenset[int]:
    """Places of a forward's outputs that it computes for nobody but the inputs of its backward that have these names.

    torch's partitioner calls an input of the backward as the node that is saved for it.
    """
    outputs = graph.output_node().args[0]
    return frozenset(
        place
        for place, node in enumerate(outputs)
        if isinstance(node, fx.Node) and node.op != "placeholder" and node.name in names and outputs.count(node) == 1
    )


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
