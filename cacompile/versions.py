"""One backward graph, compiled in versions; which one runs is decided each time by the mask of its module."""

from __future__ import annotations

import contextlib
import contextvars
import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._guards import CompileContext, TracingContext, compile_context, detect_fake_mode, tracing
from torch._inductor import graph as inductor_graph
from torch.autograd import profiler

from .inner import Compile
from .passes.guard import FLAGS, HOST_FLAGS, guard_weight_grads
from .passes.verify import Broken, verify
from .plan import Plan, Skip
from .runtime.instance import find_instance
from .trail import Trail, profiled

log = logging.getLogger(__name__)


class Guarded(NamedTuple):
    """The guarded version, and what it masks; one value, so that no thread sees half of it."""

    run: Callable[[list[Any]], Any]
    masked: frozenset[str]
    host: bool
    """Whether it takes the flags in CPU memory too."""


class BackwardVersions:
    """The callable that AOTAutograd gets for a backward graph.

    dense:   the graph as it came, without our handle: Inductor's own. Runs whenever all groups are on.
    guarded: products replaced by masked ones, with one more input, the flags. Compiled the first time a group is off.
             On a GPU the flags come twice, so that the host may choose how to compute; under CUDA graphs it may not.
    """

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        settings: dict[str, Any],
        *,
        handle: int,
        plan: Plan,
        compile_inner: Compile,
        on_guarded: Callable[[Plan], None],
        trail: Trail,
    ) -> None:
        self._handle = handle
        self._slot = _erase_handle(gm, handle)
        self._inputs = [value for i, value in enumerate(inputs) if i != handle]
        self._settings = _without_input(settings, handle)
        self._plan = plan
        self._compile = compile_inner
        self._on_guarded = on_guarded
        self._trail = trail
        self._context = TracingContext.try_get()
        self._compile_id = CompileContext.try_get()
        self._donated = _donated(self._context, handle)
        # overrides of Inductor's config live here, and not in the autograd thread that will want the guarded version
        self._overrides = contextvars.copy_context()
        # Inductor edits the graph that it compiles; constants are not copied, which a fake mode would not let us
        self._source: fx.GraphModule | None = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        self._before: fx.Graph | None = None
        self._guarded: Guarded | None = None
        self._settled = False
        trail.version("dense")
        with _donating(self._context, self._donated):
            self._dense = self._compile(gm, self._inputs, **self._settings)
        # on the instance, because wrappers copy it from there
        self._boxed_call = True

    def __call__(self, args: list[Any]) -> list[Any]:
        instance = find_instance(args.pop(self._handle))
        run, masked, flags = self._dense, frozenset[str](), None
        if instance is not None:
            instance.count_backward()
            if instance.wants_guarded() and (guarded := self.guarded()):
                args.append(instance.flags(guarded.masked))
                flags = instance.host_flags
                if guarded.host:
                    args.append(flags)
                run, masked = guarded.run, guarded.masked
            if instance.skips is not (flags is not None):
                instance.skips = flags is not None
                self._trail.switched("guarded" if instance.skips else "dense")
        if profiler._is_profiler_enabled:
            with profiled(self._plan, masked, None if flags is None else flags.numpy()):
                grads = list(run(args))
        else:
            grads = list(run(args))
        if self._slot is not None:
            grads.insert(self._slot, None)
        return grads

    def guarded(self) -> Guarded | None:
        """The guarded version, compiled when first asked for; None if nothing of this graph can be masked."""
        if not self._settled:
            from torch._dynamo.convert_frame import compile_lock

            with compile_lock:  # one thread makes it, the others wait; no lock of our own, which could cross with this
                if self._source is not None:
                    source, self._source = self._source, None
                    host = self._wants_host()
                    plan, run = self._build_guarded(source, host)
                    self._on_guarded(plan)
                    masked = frozenset(plan.guarded or ())
                    self._guarded = Guarded(run, masked, host) if run is not None else None
                    self._settled = True
        return self._guarded

    @property
    def graph(self) -> fx.Graph:
        """The backward graph as it came, without our handle and the tensors of its constants: to be looked at."""
        source = self._source
        return copy.deepcopy(source.graph) if source is not None else self._before or fx.Graph()

    @property
    def host(self) -> bool:
        """Whether the guarded version takes, or would take, the flags in CPU memory too."""
        return self._wants_host()

    def _build_guarded(self, gm: fx.GraphModule, host: bool) -> tuple[Plan, Callable[[list[Any]], Any] | None]:
        before = self._before = copy.deepcopy(gm.graph)
        try:
            plan = guard_weight_grads(gm, self._plan, host=host)
            verify(before, gm.graph, plan.guarded or ())
        except Broken as broken:
            log.warning("a rewrite of the backward graph broke its promise, so it stays dense: %s", broken)
            return _all_dense(self._plan), None
        except Exception:
            log.warning("the guarded backward could not be made, so this graph stays dense", exc_info=True)
            return _all_dense(self._plan), None
        if not plan.guarded:
            log.warning("no weight gradient of this graph can be skipped; it stays dense. cacompile.explain says why")
            return plan, None
        flags = self._fake_flags(gm)
        start = time.perf_counter()
        try:
            run = self._overrides.copy().run(self._compile_guarded, gm, flags, plan)
            self._trail.guarded(plan, time.perf_counter() - start)
            return plan, run
        except Exception:
            log.warning("the guarded backward could not be compiled, so this graph stays dense", exc_info=True)
            return _all_dense(plan), None

    def _compile_guarded(self, gm: fx.GraphModule, flags: list[torch.Tensor], plan: Plan) -> Callable[[list[Any]], Any]:
        with torch.no_grad(), self._compiling(), _donating(self._context, self._donated), _aligned_host(len(flags) > 1):
            self._trail.version("guarded")
            self._trail.guarding(self._plan, plan, gm)
            return self._compile(gm, [*self._inputs, *flags], **self._settings)

    def _device(self) -> torch.device:
        return next(g.param.placeholder.meta["val"].device for g in self._plan.grads)

    def _wants_host(self) -> bool:
        """A CUDA graph would freeze what the host decides."""
        return bool(self._plan.grads) and self._device().type == "cuda" and not self._settings.get("cudagraphs", True)

    def _fake_flags(self, gm: fx.GraphModule) -> list[torch.Tensor]:
        """Values for compiling, of the inputs that guarding has added."""
        fakes = []
        for name, device in ((FLAGS, self._device()), (HOST_FLAGS, torch.device("cpu"))):
            for node in gm.graph.find_nodes(op="placeholder", target=name):
                with detect_fake_mode(self._inputs) or contextlib.nullcontext():
                    node.meta["val"] = torch.empty(self._plan.blocks, dtype=torch.uint8, device=device)
                fakes.append(node.meta["val"])
        return fakes

    @contextlib.contextmanager
    def _compiling(self) -> Iterator[None]:
        """The surroundings, beside the lock, in which AOTAutograd compiles a backward lazily."""
        with (
            tracing(self._context),
            compile_context(self._compile_id),
            torch._C._DisableAutocast(),
        ):
            yield


def _all_dense(plan: Plan) -> Plan:
    left = {skip.param for skip in plan.skips}
    reason = "the guarded backward could not be made, the log says why"
    skips = [Skip(g.param.name, g.kind, reason, g.flops) for g in plan.grads if g.param.name not in left]
    return replace(plan, guarded=(), skips=(*plan.skips, *skips))


def compile_without_handle(
    gm: fx.GraphModule, inputs: Sequence[Any], settings: dict[str, Any], *, handle: int, compile_inner: Compile
) -> Any:
    """Compile a forward or inference graph as if our handle were not among its inputs and saved tensors."""
    saved_at = _erase_handle(gm, handle)
    compiled: Any = compile_inner(
        gm, [value for i, value in enumerate(inputs) if i != handle], **_without_input(settings, handle)
    )
    context = TracingContext.try_get()
    if saved_at is not None and context is not None and context.output_strides:
        context.output_strides.insert(saved_at, None)
    # wrapped inside, so that Inductor still sees its own class (it asks for partitions of CUDA graphs)
    inside = hasattr(compiled, "current_callable")
    run: Callable[[list[Any]], Any] = compiled.current_callable if inside else compiled

    def with_handle(args: list[Any]) -> Any:
        value = args.pop(handle)
        if saved_at is None:
            return run(args)
        outputs = list(run(args))
        outputs.insert(saved_at, value)
        return outputs

    if inside:
        compiled.current_callable = with_handle
        return compiled
    with_handle._boxed_call = True  # type: ignore[attr-defined]
    return with_handle


def _erase_handle(gm: fx.GraphModule, handle: int) -> int | None:
    """Remove the handle from a graph's inputs and outputs; returns the output position where it was."""
    node = gm.graph.find_nodes(op="placeholder")[handle]
    output = gm.graph.output_node()
    outputs = list(output.args[0])
    slot = outputs.index(node) if node in outputs else None
    if slot is not None:
        del outputs[slot]
        output.args = (tuple(outputs),)
        if "desc" in output.meta:  # one for each output
            output.meta["desc"] = [desc for i, desc in enumerate(output.meta["desc"]) if i != slot]
        if "user_visible_output_idxs" in output.meta:
            output.meta["user_visible_output_idxs"] = _without(output.meta["user_visible_output_idxs"], slot)
    gm.graph.erase_node(node)
    gm.recompile()
    return slot


def _without_input(settings: dict[str, Any], handle: int) -> dict[str, Any]:
    """`compile_fx_inner`'s keyword arguments for the graph without the input at `handle`."""
    return {**settings, "static_input_idxs": _without(settings.get("static_input_idxs", ()), handle)}


def _without(positions: Sequence[int], gone: int) -> list[int]:
    return [i - (i > gone) for i in positions if i != gone]


def _donated(context: TracingContext | None, handle: int) -> list[int] | None:
    metadata = context.fw_metadata if context is not None else None
    return None if metadata is None or metadata.bw_donated_idxs is None else _without(metadata.bw_donated_idxs, handle)


@contextlib.contextmanager
def _aligned_host(wanted: bool) -> Iterator[None]:
    """Inductor takes inputs in CPU memory for unaligned, and what is computed with them too: slow reads of every dW.

    Our flags touch no alignment: results of masked operations are memory of their own.
    """
    before = getattr(inductor_graph, "should_assume_input_aligned", None)
    if not wanted or before is None:
        yield
        return
    inductor_graph.should_assume_input_aligned = lambda tensor: tensor.device.type == "cpu" or before(tensor)
    try:
        yield
    finally:
        inductor_graph.should_assume_input_aligned = before


@contextlib.contextmanager
def _donating(context: TracingContext | None, donated: list[int] | None) -> Iterator[None]:
    """Tell Inductor which inputs of the graph without the handle it may overwrite."""
    if context is None or donated is None:
        yield
        return
    metadata = context.fw_metadata
    before, metadata.bw_donated_idxs = metadata.bw_donated_idxs, donated
    try:
        yield
    finally:
        metadata.bw_donated_idxs = before
