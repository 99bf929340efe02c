"""The cuts of one graph: in which calls its forward is lean, so that the backward must end where it does."""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

import torch
from torch import fx

from cacompile.passes.truncate import truncate
from cacompile.state.binding import GraphBinding
from cacompile.torch_internals import (
    TRACED,
    broken_contracts,
    captured_backwards,
    compiled_function,
    dynamo_config,
    trace_as,
    traced_as,
)

from .backward import BackwardVersions
from .fallback import warn_of_fault
from .lean import Cut, LeanForwards
from .version import Run

log = logging.getLogger(__name__)

WHOLE = "its forward saves all from now on"


MOST = 64
"""Classes for compiled autograd that are kept; others are made anew."""


class Cuts:
    """Of each call, by its handle. What runs in it is held by the lean forwards and the truncated backwards."""

    def __init__(self) -> None:
        self.lean: LeanForwards | None = None
        """None while none can be made."""
        self._by_handle: dict[int, Cut] = {}
        self._captured = captured_backwards()
        self._traced: dict[Cut, Any] = {}
        """What stands in for the autograd function of a lean forward."""

    def find(self, versions: BackwardVersions | None, binding: GraphBinding, dead: frozenset[int]) -> Cut | None:
        """The cut for what is frozen now and inputs that want no gradient; None where the whole forward must run.

        versions: of the backward.
        """
        # a backward that compiled autograd traces reads all that is saved, so one must have come through us
        if versions is None or self.lean is None or not torch.is_grad_enabled() or not binding.spent.backwards:
            return None
        if dynamo_config.compiled_autograd or captured_backwards() != self._captured or broken_contracts(TRACED):
            return None
        version = versions.truncated_version(binding, dead)
        return self.lean.find(version, versions.aside_for(binding)) if version is not None else None

    def note(self, handle: int, cut: Cut) -> None:
        """What a call with this handle leaves out."""
        self._by_handle[handle] = cut

    def of(self, handle: Any) -> Cut | None:
        """What the forward of a call has left out."""
        return self._by_handle.get(handle)

    def forward_of(self, handle: Any) -> Run | None:
        """What runs in place of the whole forward."""
        cut = self._by_handle.get(handle) if self._by_handle else None
        return None if cut is None or self.lean is None else self.lean.run_for(cut.unread)

    def limit_tracing(self, versions: BackwardVersions | None, cut: Cut, outputs: Any) -> None:
        """After a lean forward: should compiled autograd trace its backward, let that read no more than was saved."""
        try:
            found = [outputs] if isinstance(outputs, torch.Tensor) else outputs
            node = next(filter(None, map(compiled_function, found)), None)
            if node is None:
                self.lean = None
                log.info("no output leads to the backward of a graph: %s", WHOLE)
                return
            if cut not in self._traced:
                if len(self._traced) >= MOST:
                    self._traced.clear()
                slot = versions.slot if versions is not None else None
                places = frozenset(place + (slot is not None and place >= slot) for place in cut.places)
                self._traced[cut] = traced_as(node, functools.partial(_truncated, places=places))
            trace_as(node, self._traced[cut])
        except Exception:
            self.lean = None
            warn_of_fault(log, "looking for the backward of a forward", WHOLE)


def _truncated(gm: fx.GraphModule, *, places: frozenset[int]) -> fx.GraphModule:
    """A copy of a backward graph, with the handle, in which these outputs are None."""
    copied = fx.GraphModule(gm, copy.deepcopy(gm.graph))
    truncate(copied, places)
    return copied
