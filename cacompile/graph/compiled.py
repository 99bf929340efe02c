"""One compiled graph: its plan, the hooks it gives the inner compiler, and the bindings that run through it."""

from __future__ import annotations

import copy
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import fx

from cacompile.config import Config
from cacompile.layout import MaskLayout
from cacompile.passes import make_plan, mark_products
from cacompile.passes.joint import GraphInputs, find_frozen, find_params
from cacompile.passes.lower import lower, with_outcome, with_sources
from cacompile.passes.plan import Plan, without_nodes
from cacompile.state.binding import GraphBinding
from cacompile.torch_internals import (
    CAN_COMPILE_ASIDE,
    add_to_key,
    caches_are_on,
    entries_hold_code,
    functorch_config,
)

from .aside import Aside
from .backward import BackwardVersions
from .cache_key import cache_key
from .calls import DENSE, Calls
from .cuts import Cuts
from .facts import BackwardFacts, ForwardFacts
from .fallback import warn_of_fault
from .handle import Instead, compile_without_handle, find_handle, has_handle, save_handle, with_handle
from .inner import Compile, Inner, inner_of
from .lean import LeanForwards
from .log import CompileLog
from .version_cache import VersionCache

log = logging.getLogger(__name__)

_alive: weakref.WeakSet[CompiledGraph] = weakref.WeakSet()


def compiled_graphs() -> Iterator[CompiledGraph]:
    """All graphs that are compiled, whichever model they are of."""
    yield from list(_alive)


def compile_graph(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    config: Config,
    patches: dict[str, Any],
    *,
    compile_inner: Compile | None = None,
) -> tuple[CompiledGraph, Callable[..., Any]]:
    """Compile one of Dynamo's graphs through the whole pipeline of the inner compiler, with our two hooks in it.

    patches: of Inductor's configuration; compile_inner: for those who only look, what turns a finished graph into a
    callable in place of the inner compiler's own last step.
    Returns the graph, and the compiled callable, which takes one more input than the graph: the handle.
    """
    inner = inner_of(config, patches, compile_inner)
    inputs = GraphInputs.of(gm, example_inputs)
    graph, handle = with_handle(gm, example_inputs)
    theirs = functorch_config.joint_custom_pass
    key = None
    if config.inner == "inductor" and compile_inner is None and caches_are_on():
        key = cache_key(inputs, config, theirs if callable(theirs) else None)
        if key is None:
            log.info("a graph is not cached: torch._functorch.config.joint_custom_pass has no uuid()")
    ours = CompiledGraph(inputs, config, inner, CompileLog(quiet=compile_inner is not None), cached=key is not None)

    def joint_pass(joint: fx.GraphModule, joint_inputs: Any) -> fx.GraphModule:
        return ours.joint_pass(theirs(joint, joint_inputs) if callable(theirs) else joint, joint_inputs)

    with functorch_config.patch(joint_custom_pass=joint_pass, enable_autograd_cache=key is not None):
        if key is None:
            return ours, inner.pipeline(graph, [*example_inputs, handle], ours.inner_compile)
        from .stored import compiling

        add_to_key(graph, key)
        token = compiling.set(ours)
        try:
            with entries_hold_code():
                # on a hit none of our hooks runs, but the entry calls `load_forward` and `load_backward`
                return ours, inner.pipeline(graph, [*example_inputs, handle], ours.inner_compile)
        finally:
            compiling.reset(token)


class CompiledGraph:
    """Watches one graph being compiled (`joint_pass`, `inner_compile`), then runs it (`bind`)."""

    def __init__(
        self, inputs: GraphInputs, config: Config, inner: Inner, compile_log: CompileLog, *, cached: bool = False
    ) -> None:
        """cached: whether torch's caches hold it, and its versions."""
        self.inputs = inputs
        self.config = config
        self.plan = Plan()
        """Speaks of nodes of the joint graph, which it keeps for those who look."""
        self.layout = MaskLayout()
        self.forward: fx.Graph | None = None
        """As the inner compiler got it, which edits what it gets."""
        self.backward: BackwardVersions | None = None
        self._analysed = False
        self._cuts = Cuts()
        self._calls = Calls(self._cuts)
        self._inner = inner
        self._cached = cached
        self._log = compile_log
        _alive.add(self)

    @property
    def bindings(self) -> dict[tuple[int, ...], GraphBinding]:
        """By the ids of the parameters that they run with."""
        return self._calls.bindings

    def joint_pass(self, gm: fx.GraphModule, joint_inputs: Any) -> fx.GraphModule:
        """Hook 1, on the joint graph before the partitioner: find the weight gradients, have the handle saved.

        Called for what else is traced meanwhile too, such as patterns that Inductor looks for: those are not ours.
        """
        if self._analysed or not has_handle(gm.graph, self.inputs):
            return gm
        self._analysed = True
        self.plan, self.layout, self.backward = Plan(), MaskLayout(), None  # of an entry that torch could not use
        try:
            plan = make_plan(
                find_params(gm.graph, self.inputs),
                block_rows=self.config.block_rows,
                graphs=self._inner.captured(),
                frozen=find_frozen(gm.graph, self.inputs),
            )
            layout = lower(plan)
            if plan.grads:
                mark_products(plan)
                save_handle(gm, self.inputs)
        except Exception:
            warn_of_fault(log, "analysing a joint graph", DENSE)
            return gm
        self._log.planned(plan)
        self.plan, self.layout = plan, layout
        return gm

    def inner_compile(self, gm: fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        """Hook 2, instead of the inner compiler's last step, for the forward, the backward or an inference graph."""
        handle = find_handle(gm.graph, self.inputs)
        is_backward = settings.get("is_backward", False)
        if handle is None:
            if is_backward and (self.plan.grads or not self._analysed):
                warn_of_fault(log, "finding the handle in a backward graph", DENSE, trace=False)
            return self._storable(self._inner.compile(gm, inputs, **settings))
        without = functools.partial(compile_without_handle, handle=handle, compile_inner=self._inner.compile)
        if not is_backward:
            self.forward = copy.deepcopy(gm.graph)
            if self._cached:
                without = functools.partial(without, keep=functools.partial(self._stored_forward, handle))
            wanted = self._cached or self.config.max_truncated  # what is cached is for processes with other options too
            if settings.get("is_inference", False) or not wanted or not self.plan.grads:
                return without(gm, inputs, settings)
            self._cuts.lean = lean = LeanForwards.of(
                gm,
                inputs,
                settings,
                handle=handle,
                compile_inner=self._inner.compile,
                compile_log=self._log,
                limit=self.config.max_truncated,
            )
            # beside the code, and no part of it: what is stored is the whole forward, whatever is frozen now
            compiled = without(gm, inputs, settings, instead=self._cuts.forward_of)
            lean.compiled(compiled, self._version_cache if self._cached else None)
            return compiled
        for param in self.plan.params[:1]:
            param.placeholder.graph.owning_module = None  # partitioned by now: its constants are not needed any more
        untouched = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        try:
            self.backward = BackwardVersions(
                gm,
                inputs,
                settings,
                handle=handle,
                plan=self.plan,
                layout=self._set_layout(with_sources(self.layout, gm.graph, handle)),
                compile_inner=self._inner.compile,
                on_masked=self._take_over,
                find_binding=self.find_binding,
                compile_log=self._log,
                max_truncated=self.config.max_truncated,
                find_cut=self._cuts.of,
                aside=self._aside(),
                cache=self._version_cache if self._cached else None,
            )
            return self._stored_backward(self.backward) if self._cached else self.backward
        except Exception:
            compiled = without(untouched, inputs, settings)  # raises where the inner compiler itself does
            warn_of_fault(log, "compiling a backward in versions", DENSE)
            return self._unstored(compiled) if self._cached else compiled

    def _stored_forward(self, handle: int, compiled: Any, saved_at: int | None) -> Any:
        from .stored import StorableFxGraph, StoredForward

        if not isinstance(compiled, StorableFxGraph):
            return self._unstored(compiled)
        facts, lean = ForwardFacts(handle, saved_at, without_nodes(self.plan), self.layout), self._cuts.lean
        return StoredForward.of(compiled, facts, lambda: lean.stored() if lean is not None else None)

    def _stored_backward(self, versions: BackwardVersions) -> Any:
        from .stored import StoredBackward

        return StoredBackward(versions, versions.stored)

    def _storable(self, compiled: Any) -> Any:
        """What AOTAutograd's cache may be given."""
        if not self._cached:
            return compiled
        from .stored import OutputCode

        return compiled if isinstance(compiled, OutputCode) else self._unstored(compiled)

    def _unstored(self, compiled: Any) -> Any:
        from .stored import Unstored

        return Unstored(compiled)

    def _aside(self) -> Aside | None:
        """Where versions are compiled that no step is to wait for; None where steps wait.

        What is captured into a CUDA graph is captured by the thread that runs it.
        """
        waits = self.config.switch == "at once" or self._inner.captured() or not CAN_COMPILE_ASIDE
        return None if waits else Aside()

    def _version_cache(self, identity: str) -> VersionCache:
        return VersionCache(identity, self._inner.patched)

    def load_forward(self, facts: ForwardFacts, settings: dict[str, Any]) -> Instead:
        """Torch has found the graph in its cache. Returns what may run in the place of its forward."""
        self.plan, self.layout = facts.plan, facts.layout
        self._log.found(facts.plan)
        if facts.lean is not None and self.config.max_truncated:
            self._cuts.lean = LeanForwards.load(
                facts.lean,
                settings,
                compile_inner=self._inner.compile,
                compile_log=self._log,
                limit=self.config.max_truncated,
                cache=self._version_cache,
            )
        return self._cuts.forward_of

    def load_backward(
        self, facts: BackwardFacts, dense: Callable[[list[Any]], Any], settings: dict[str, Any]
    ) -> Callable[[list[Any]], Any]:
        """And its backward, of which `dense` is the dense version."""
        self.backward = BackwardVersions.load(
            facts,
            dense,
            settings,
            compile_inner=self._inner.compile,
            on_masked=self._take_over,
            find_binding=self.find_binding,
            compile_log=self._log,
            max_truncated=self.config.max_truncated,
            find_cut=self._cuts.of,
            aside=self._aside(),
            cache=self._version_cache,
        )
        self._set_layout(facts.layout)
        return self.backward

    def _take_over(self, plan: Plan) -> MaskLayout:
        """The masked version was made: the plan now says what it really masks."""
        self.plan = plan
        return self._set_layout(with_outcome(self.layout, plan))

    def _set_layout(self, layout: MaskLayout) -> MaskLayout:
        self.layout = layout
        for binding in self.bindings.values():
            binding.layout = layout
        return layout

    def find_binding(self, handle: Any) -> GraphBinding | None:
        """The binding of this graph that a handle names; None for one that leads nowhere, such as a traced one."""
        return self._calls.find_binding(handle)

    def bind(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """The callable for Dynamo: adds the handle of the binding whose parameters it is called with."""
        return self._calls.bind(self, compiled)
