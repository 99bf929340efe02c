"""Makes the masked version of one backward graph, once and late, and then lets go of all that it took to make it."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx

from cacompile.passes.mask import FLAGS, HOST_FLAGS, mask_weight_grads
from cacompile.passes.plan import Plan, StaysDense
from cacompile.passes.verify import Broken, verify
from cacompile.torch_internals import (
    CompileContext,
    TracingContext,
    aligned_host_inputs,
    compiling_backward,
    detect_fake_mode,
    donating,
)

from .inner import Compile
from .log import CompileLog

log = logging.getLogger(__name__)


class MaskedVersion(NamedTuple):
    """The masked version, and what it masks; one value, so that no thread sees half of it."""

    run: Callable[[list[Any]], Any]
    masked: frozenset[str]
    host: bool
    """Whether it takes the flags in CPU memory too."""


class MaskedMaker:
    """All that the masked version is made of: a copy of the graph, its inputs and the surroundings to compile it in."""

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        settings: dict[str, Any],
        *,
        plan: Plan,
        donated: list[int] | None,
        compile_inner: Compile,
        compile_log: CompileLog,
    ) -> None:
        # Inductor edits the graph that it compiles; constants are not copied, which a fake mode would not let us
        self.source = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        self._inputs = inputs
        self._settings = settings
        self._plan = plan
        self._donated = donated
        self._compile = compile_inner
        self._log = compile_log
        self._context = TracingContext.try_get()
        self._compile_id = CompileContext.try_get()
        # overrides of Inductor's config live here, and not in the autograd thread that will want the masked version
        self._overrides = contextvars.copy_context()
        self._device = next((g.param.placeholder.meta["val"].device for g in plan.grads), torch.device("cpu"))

    @property
    def wants_host(self) -> bool:
        """Whether the flags come in CPU memory too, for the host to decide by; a CUDA graph would freeze that."""
        return self._device.type == "cuda" and not self._settings.get("cudagraphs", True)

    def make(self) -> tuple[Plan, MaskedVersion | None]:
        """The plan, which now says what is really masked, and the version; None, with reasons in the plan, if none is.

        Edits `source`. Never raises.
        """
        before, host = copy.deepcopy(self.source.graph), self.wants_host
        try:
            plan = mask_weight_grads(self.source, self._plan, host=host)
            verify(before, self.source.graph, plan.masked or ())
        except Broken as broken:
            log.warning("a rewrite of the backward graph broke its promise, so it stays dense: %s", broken)
            return _all_dense(self._plan), None
        except Exception:
            log.warning("the masked backward could not be made, so this graph stays dense", exc_info=True)
            return _all_dense(self._plan), None
        if not plan.masked:
            log.warning("no weight gradient of this graph can be skipped; it stays dense. cacompile.explain says why")
            return plan, None
        start = time.perf_counter()
        try:
            run = self._overrides.run(self._compile_masked, plan)
        except Exception:
            log.warning("the masked backward could not be compiled, so this graph stays dense", exc_info=True)
            return _all_dense(plan), None
        self._log.masked(plan, time.perf_counter() - start)
        return plan, MaskedVersion(run, frozenset(plan.masked), host)

    def _compile_masked(self, plan: Plan) -> Callable[[list[Any]], Any]:
        flags = self.fake_flags(plan.blocks)
        with (
            torch.no_grad(),
            compiling_backward(self._context, self._compile_id),
            donating(self._context, self._donated),
            aligned_host_inputs(len(flags) > 1),
        ):
            self._log.version("masked")
            self._log.masking(self._plan, plan, self.source)
            return self._compile(self.source, [*self._inputs, *flags], **self._settings)

    def fake_flags(self, blocks: int) -> list[torch.Tensor]:
        """Values for compiling, of the inputs that masking has added: uint8 [blocks] each."""
        fakes = []
        for name, device in ((FLAGS, self._device), (HOST_FLAGS, torch.device("cpu"))):
            for node in self.source.graph.find_nodes(op="placeholder", target=name):
                with detect_fake_mode(self._inputs) or contextlib.nullcontext():
                    node.meta["val"] = torch.empty(blocks, dtype=torch.uint8, device=device)
                fakes.append(node.meta["val"])
        return fakes


def _all_dense(plan: Plan) -> Plan:
    left = {dense.param for dense in plan.dense}
    reason = "the masked backward could not be made, the log says why"
    dense = [StaysDense(g.param.name, g.kind, reason, g.flops) for g in plan.grads if g.param.name not in left]
    return replace(plan, masked=(), dense=(*plan.dense, *dense))
