"""Makes the masked version of one backward graph, once and late, and then lets go of all that it took to make it."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import time
from dataclasses import replace
from functools import cached_property

import torch
from torch import fx

from cacompile.passes.mask import FLAGS, HOST_FLAGS, mask_weight_grads
from cacompile.passes.plan import Plan, StaysDense
from cacompile.passes.verify import Broken, verify
from cacompile.torch_internals import detect_fake_mode

from .facts import VersionFacts
from .source import BackwardSource
from .version import Version

log = logging.getLogger(__name__)


class MaskedMaker:
    """Edits a copy of a backward's source into the masked version."""

    def __init__(self, source: BackwardSource, plan: Plan, device: torch.device) -> None:
        """device: where the weights are."""
        self._source = source
        self.plan = plan
        self.device = device

    @cached_property
    def module(self) -> fx.GraphModule:
        """The copy that is edited."""
        return self._source.copy()

    @property
    def wants_host(self) -> bool:
        """Whether the flags come in CPU memory too, for the host to decide by; a CUDA graph would freeze that."""
        return self.device.type == "cuda" and not self._source.settings.get("cudagraphs", True)

    def edit(self) -> Plan:
        """Mask the products of `module`; the plan, which now says what is really masked. Raises where it cannot."""
        before = copy.deepcopy(self.module.graph)
        plan = mask_weight_grads(self.module, self.plan, host=self.wants_host)
        verify(before, self.module.graph, plan.masked or ())
        return plan

    def make(self) -> tuple[Plan, Version | None]:
        """The plan, which now says what is really masked, and the version; None, with reasons in the plan, if none is.

        Never raises.
        """
        if (found := self._source.find("masked")) is not None:
            run, facts = found
            plan = replace(self.plan, masked=facts.masked, dense=facts.dense)
            return plan, Version(run, frozenset(facts.masked), self.wants_host)
        try:
            plan = self.edit()
        except Broken as broken:
            log.warning("a rewrite of the backward graph broke its promise, so it stays dense: %s", broken)
            return _all_dense(self.plan), None
        except Exception:
            log.warning("the masked backward could not be made, so this graph stays dense", exc_info=True)
            return _all_dense(self.plan), None
        if not plan.masked:
            log.warning("no weight gradient of this graph can be skipped; it stays dense. cacompile.explain says why")
            return plan, None
        start = time.perf_counter()
        try:
            note = functools.partial(self._source.log.masking, self.plan, plan, self.module)
            run = self._source.compile(self.module, "masked", self.fake_flags(plan.blocks), note)
        except Exception:
            log.warning("the masked backward could not be compiled, so this graph stays dense", exc_info=True)
            return _all_dense(plan), None
        self._source.log.masked(plan, time.perf_counter() - start)
        self._source.save("masked", run, VersionFacts(plan.masked, plan.dense))
        return plan, Version(run, frozenset(plan.masked), self.wants_host)

    def fake_flags(self, blocks: int) -> list[torch.Tensor]:
        """Values for compiling, of the inputs that masking has added: uint8 [blocks] each."""
        fakes = []
        for name, device in ((FLAGS, self.device), (HOST_FLAGS, torch.device("cpu"))):
            for node in self.module.graph.find_nodes(op="placeholder", target=name):
                with detect_fake_mode(self._source.inputs) or contextlib.nullcontext():
                    node.meta["val"] = torch.empty(blocks, dtype=torch.uint8, device=device)
                fakes.append(node.meta["val"])
        return fakes


def _all_dense(plan: Plan) -> Plan:
    left = {dense.param for dense in plan.dense}
    reason = "the masked backward could not be made, the log says why"
    dense = [StaysDense(g.param.name, g.kind, reason, g.flops) for g in plan.grads if g.param.name not in left]
    return replace(plan, masked=(), dense=(*plan.dense, *dense))
