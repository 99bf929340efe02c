"""One backward graph, compiled in versions; which one runs is decided each time by the mask of its module."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import fx

from cacompile.layout import MaskLayout
from cacompile.passes.plan import Plan
from cacompile.state.binding import GraphBinding
from cacompile.torch_internals import (
    TracingContext,
    autograd_profiler,
    compile_lock,
    donated_inputs,
    donating,
    warning_once,
)

from .fallback import warn_of_fault
from .handle import erase_handle, without, without_input
from .inner import Compile
from .log import CompileLog, profiled
from .masked import MaskedMaker, MaskedVersion
from .reading import reads_gradients

log = logging.getLogger(__name__)

Run = Callable[[list[Any]], Any]

KEEP_OUT = "cacompile.session(model).pin({name: True})"


class BackwardVersions:
    """The callable that AOTAutograd gets for a backward graph.

    dense:  the graph as it came, without our handle: Inductor's own. Runs whenever all groups are on.
    masked: products replaced by masked ones, with one more input, the flags. Compiled the first time a group is off.
            On a GPU the flags come twice, so that the host may choose how to compute; under CUDA graphs it may not.
    """

    # torch's wrappers copy an instance's __dict__, and would go on holding what is released here
    __slots__ = (
        "__dict__",
        "__weakref__",
        "_dense",
        "_find_binding",
        "_graph",
        "_handle",
        "_layout",
        "_log",
        "_maker",
        "_masked",
        "_on_masked",
        "_slot",
        "host",
    )

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        settings: dict[str, Any],
        *,
        handle: int,
        plan: Plan,
        layout: MaskLayout,
        compile_inner: Compile,
        on_masked: Callable[[Plan], MaskLayout],
        find_binding: Callable[[Any], GraphBinding | None],
        compile_log: CompileLog,
    ) -> None:
        self._handle = handle
        self._slot = erase_handle(gm, handle)
        self._layout = layout
        self._on_masked = on_masked
        self._find_binding = find_binding
        self._log = compile_log
        inputs = [value for i, value in enumerate(inputs) if i != handle]
        settings = without_input(settings, handle)
        context = TracingContext.try_get()
        donated = donated_inputs(context)
        donated = None if donated is None else without(donated, handle)
        self._maker: MaskedMaker | None = MaskedMaker(
            gm, inputs, settings, plan=plan, donated=donated, compile_inner=compile_inner, compile_log=compile_log
        )
        self.host = self._maker.wants_host
        """Whether the masked version takes, or would take, the flags in CPU memory too."""
        self._masked: MaskedVersion | None = None
        self._graph = fx.Graph()
        compile_log.version("dense")
        with donating(context, donated):
            self._dense: Run = compile_inner(gm, inputs, **settings)
        # in __dict__, because wrappers copy it from there
        self._boxed_call = True

    def __call__(self, args: list[Any]) -> list[Any]:
        handle = args.pop(self._handle)
        run, masked, flags = self._choose(handle, args)
        if autograd_profiler._is_profiler_enabled:
            with profiled(self._layout, masked, flags):
                grads = list(run(args))
        else:
            grads = list(run(args))
        if self._slot is not None:
            grads.insert(self._slot, None)
        return grads

    def _choose(self, handle: Any, args: list[Any]) -> tuple[Run, frozenset[str], np.ndarray | None]:
        """The version to run, what it masks and its flags, which are added to `args`; dense where anything fails."""
        count = len(args)
        try:
            binding = self._find_binding(handle)
            if binding is not None:
                sizes = self._sizes(args)
                binding.count_backward(sizes)
                version = self.masked_version() if binding.wants_masked() and not self._is_read(binding) else None
                self._note_switch(binding, version)
                if version is not None:
                    flags = binding.leave_out(sizes)
                    args += [flags, binding.host_flags] if version.host else [flags]
                    return version.run, version.masked, binding.host_flags.numpy()
        except Exception:
            del args[count:]
            warn_of_fault(log, "choosing the version of a backward", "this backward computes all weight gradients")
        return self._dense, frozenset(), None

    def _is_read(self, binding: GraphBinding) -> bool:
        """Whether the user gets these gradients in hand: then all are computed."""
        if not reads_gradients(binding.live_inputs()):
            return False
        warning_once(
            log,
            "torch.autograd.grad asks for gradients of parameters of which some are skipped in this step: such a "
            "backward computes all of them. Weights that are often read so can be kept out: %s",
            KEEP_OUT,
        )
        return True

    def _sizes(self, args: list[Any]) -> Sequence[int]:
        """What the monomials that FLOPs are multiples of are in this call."""
        sources = self._layout.sources
        if not sources:
            return (1,)
        return [math.prod(of.read(args) for of in factors) for factors in sources]

    def _note_switch(self, binding: GraphBinding, version: MaskedVersion | None) -> None:
        if binding.ran_masked is not (version is not None):
            binding.ran_masked = version is not None
            self._log.switched("masked" if binding.ran_masked else "dense")

    def masked_version(self) -> MaskedVersion | None:
        """The masked version, compiled when first asked for; None if nothing of this graph can be masked."""
        if self._maker is not None:
            with compile_lock:  # one thread makes it, the others wait; no lock of our own, which could cross with this
                if self._maker is not None:
                    self._graph = copy.deepcopy(self._maker.source.graph)
                    try:
                        plan, self._masked = self._maker.make()
                        self._layout = self._on_masked(plan)
                    finally:
                        self._maker = None  # and all that only it has held
        return self._masked

    @property
    def graph(self) -> fx.Graph:
        """The backward graph as it came, without our handle and the tensors of its constants: to be looked at."""
        maker = self._maker
        return copy.deepcopy(maker.source.graph if maker is not None else self._graph)
