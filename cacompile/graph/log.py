"""What one compiled graph leaves for those who look: log lines, counters, artifacts for tlparse, a profile's ranges."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from torch import fx

from cacompile.kernels.ranges import named
from cacompile.layout import MaskLayout
from cacompile.notes import SLOW, say
from cacompile.passes.plan import Plan, WeightGrad
from cacompile.torch_internals import CompileContext, Range, counters, trace_structured

log = logging.getLogger(__name__)

PLAN_ARTIFACT = "convaware_plan"
"""A table of the graph's parameters: their groups, or why they stay dense."""

MASKED_ARTIFACT = "convaware_masked_backward"
"""The code of the masked version's graph, before it is compiled."""


class CompileLog:
    """Of one graph; one that is only looked at leaves none (quiet)."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._graph = str(CompileContext.current_compile_id() or "?")

    def _count(self, what: str, n: int = 1) -> None:
        if not self._quiet and n:
            counters["cacompile"][what] += n

    def planned(self, plan: Plan) -> None:
        """The joint graph has been looked at."""
        self._count("graphs")
        self._count_dense(plan, 0)
        if self._quiet:
            return
        log.info(
            "graph %s: %d gradients in %d groups can be skipped (%s of dW FLOPs), %d stay dense; %d nodes in %.2f s",
            self._graph,
            len(plan.grads),
            len(plan.groups),
            _share(sum(grad.flops for grad in plan.grads), plan.flops),
            len(plan.dense),
            plan.nodes,
            plan.analysis_s,
        )
        for skip in plan.dense:
            log.debug("graph %s: %s stays dense: %s", self._graph, skip.param, skip.reason)
        _artifact(PLAN_ARTIFACT, lambda: plan_table(plan))

    def found(self, plan: Plan) -> None:
        """The graph was found in the cache, with its plan."""
        self._count("graphs")
        self._count("graphs found in the cache")
        self._count_dense(plan, 0)
        if not self._quiet:
            log.info(
                "graph %s: found in the cache; %d gradients in %d groups can be skipped, %d stay dense",
                self._graph,
                len(plan.grads),
                len(plan.groups),
                len(plan.dense),
            )
            _artifact(PLAN_ARTIFACT, lambda: plan_table(plan))

    def version(self, name: str) -> None:
        """A version is being compiled."""
        self._count(f"versions compiled: {name}")

    def version_found(self, name: str) -> None:
        """A version that was compiled before was found in the cache; its name begins with what it is."""
        kind = name.split(" [")[0]
        self._count(f"versions found: {kind}")
        if not self._quiet:
            log.info("graph %s: %s version found in the cache", self._graph, kind)

    def masking(self, before: Plan, plan: Plan, gm: fx.GraphModule) -> None:
        """The masked version's graph is made, and will be compiled now."""
        self._count("masked parameters", len(plan.masked or ()))
        self._count_dense(plan, len(before.dense))
        if self._quiet:
            return
        for skip in plan.dense[len(before.dense) :]:
            log.info("graph %s: %s stays dense after all: %s", self._graph, skip.param, skip.reason)
        _artifact(MASKED_ARTIFACT, lambda: gm.print_readable(print_output=False))

    def masked(self, plan: Plan, seconds: float) -> None:
        """The masked version is compiled."""
        if not self._quiet:
            masked = len(plan.masked or ())
            self._took(seconds, f"masked backward compiled, {masked} of {len(plan.grads)} gradients masked")

    def truncated(self, places: int, nodes: int, seconds: float) -> None:
        """A truncated version is compiled."""
        if not self._quiet:
            what = f"truncated backward compiled: {places} gradients are None, {nodes} nodes are left"
            self._took(seconds, what)

    def _took(self, seconds: float, what: str) -> None:
        """A version is there, and a step may have waited for it."""
        line = f"graph {self._graph}: {what}, {seconds:.2f} s"
        say(line) if seconds >= SLOW else log.info(line)

    def lean(self, places: int) -> None:
        """A forward that saves less is compiled."""
        if not self._quiet:
            log.info("graph %s: forward compiled that saves %d activations less", self._graph, places)

    def switched(self, name: str) -> None:
        """Another version runs than in the last backward of the same parameters; maybe often, so no more than DEBUG."""
        self._count("version switches")
        log.debug("graph %s: backward is %s from now on", self._graph, name)

    def _count_dense(self, plan: Plan, known: int) -> None:
        self._count("dense parameters", len(plan.dense) - known)
        for skip in plan.dense[known:]:
            self._count(f"dense: {skip.reason}")


def _artifact(name: str, payload: Any) -> None:
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=payload,
        expect_trace_id=False,
    )


def plan_table(plan: Plan) -> str:
    """The plan of one graph, a line a parameter."""
    from tabulate import tabulate  # here, so that training needs torch and numpy alone

    dense = {skip.param: skip for skip in plan.dense}
    rows = []
    for param in plan.params:
        grad = next((grad for grad in plan.grads if grad.param is param), None)
        skip = dense.get(param.name)
        flops = plan.flops_by_param.get(param.name, 0)
        families = _families(plan, grad) if grad is not None and skip is None else ""
        fate = f"dense: {skip.reason}" if skip is not None else families
        products = ", ".join(product.node.name for product in grad.products) if grad is not None else ""
        shape = "x".join(map(str, param.shape))
        rows.append((param.name, shape, products, _share(flops, plan.flops), grad.blocks if grad else "", fate))
    heads = ["parameter", "shape", "gradient from", "dW FLOPs", "blocks", "groups, or why none"]
    foot = f"{len(plan.groups)} groups in {len(plan.families)} families"
    return f"{tabulate(rows, headers=heads, disable_numparse=True)}\n{foot}\n"


def _families(plan: Plan, grad: WeightGrad) -> str:
    return ", ".join(dict.fromkeys(plan.families[plan.groups[number].family].name for number in grad.groups))


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "0.0%"


@contextlib.contextmanager
def profiled(layout: MaskLayout, name: str, masked: Collection[str], flags: np.ndarray | None) -> Iterator[None]:
    """A range around one backward, and names for the masked operations in it; only while a profiler runs.

    name: the version's; masked: the parameters that it masks; flags: uint8 [layout.blocks], None where it masks none.
    """
    if flags is None:
        with Range(f"convaware backward: {name}"):
            yield
        return
    labels: dict[int, str] = {}
    off: set[int] = set()
    for grad in (grad for grad in layout.grads if grad.param in masked):
        own = flags[grad.flags]
        label = f"convaware dW {grad.param}: {int(own.sum())} of {len(own)} blocks on"
        labels.update(dict.fromkeys(range(grad.flags.start, grad.flags.stop), label))
        off.update(number for number, on in zip(grad.groups[grad.here], own) if not on)
    with Range(f"convaware backward: {name}, {len(off)} of {len(layout.groups)} groups skipped"), named(labels):
        yield
