"""A backward or forward graph as it came, and the surroundings in which any edit of it is compiled later."""

from __future__ import annotations

import contextvars
import copy
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx

from cacompile.torch_internals import (
    CompileContext,
    TracingContext,
    aligned_host_inputs,
    compiling_backward,
    donating,
    hint_of,
    key_of,
    late_context,
    pickle_graph,
    reported_strides,
    unpickle_graph,
)

from .cache_key import package_key
from .facts import VersionFacts
from .handle import without, without_input
from .inner import Compile
from .log import CompileLog
from .version import Run
from .version_cache import VersionCache, digest


class BackwardSource:
    """A copy of the graph, for the inner compiler edits what it gets, with its inputs, and how it is compiled."""

    def __init__(
        self,
        gm: fx.GraphModule,
        inputs: Sequence[Any],
        settings: dict[str, Any],
        *,
        donated: list[int] | None,
        compile_inner: Compile,
        compile_log: CompileLog,
    ) -> None:
        # constants are not copied, which a fake mode would not let us
        self.module = fx.GraphModule(gm, copy.deepcopy(gm.graph))
        self.inputs = inputs
        self._surroundings(settings, donated, compile_inner, compile_log, TracingContext.try_get())

    def _surroundings(
        self, settings: dict[str, Any], donated: list[int] | None, compile_inner: Compile, log: CompileLog, context: Any
    ) -> None:
        self.settings = settings
        self.log = log
        self.cache: VersionCache | None = None
        """Where versions are kept that were compiled of it."""
        self.donated = donated
        self._compile = compile_inner
        self._context = context
        self._compile_id = CompileContext.try_get()
        # overrides of Inductor's config live here, and not in the autograd thread that will want another version
        self._overrides = contextvars.copy_context()

    def release(self) -> None:
        """Let go of all but the graph: nothing is compiled of it any more."""
        self.inputs, self.settings, self.cache = (), {}, None
        self._context = self._compile_id = None
        self._overrides = contextvars.Context()

    def find(self, name: str) -> tuple[Run, VersionFacts] | None:
        """A version that this or another process has compiled; None where it has to be compiled."""
        if self.cache is None:
            return None
        found = self._overrides.run(self.cache.find, name, self.settings)
        if found is not None:
            self.log.version_found(name)
        return found

    def save(self, name: str, code: Run, facts: VersionFacts) -> bool:
        """Keep a version on disk. Returns whether it is there, as far as is known."""
        return self.cache is not None and self._overrides.run(self.cache.save, name, code, facts)

    def stored(self) -> bytes:
        """The graph and its inputs, pickled: see `StoredSource`. Raises whatever it likes for what cannot be."""
        return pickle_graph((self.module, list(self.inputs)))

    def copy(self) -> fx.GraphModule:
        return fx.GraphModule(self.module, copy.deepcopy(self.module.graph))

    def compile(
        self,
        gm: fx.GraphModule,
        name: str,
        flags: Sequence[torch.Tensor] = (),
        note: Callable[[], None] = lambda: None,
        *,
        gone: Sequence[int] = (),
        strides: list[Any] | None = None,
    ) -> Run:
        """Compile an edited copy.

        flags: values for the inputs that were added; note: called as a part of it; gone: positions of inputs that the
        copy has not; strides: gets those that the compiler says the outputs have, None for each that is no tensor.
        """
        return self._overrides.run(self._compile_in, gm, name, flags, note, gone, [] if strides is None else strides)

    def _compile_in(
        self,
        gm: fx.GraphModule,
        name: str,
        flags: Sequence[torch.Tensor],
        note: Callable[[], None],
        gone: Sequence[int],
        strides: list[Any],
    ) -> Run:
        inputs, settings, donated = self.inputs, self.settings, self.donated
        for i in sorted(gone, reverse=True):
            inputs, settings = [*inputs[:i], *inputs[i + 1 :]], without_input(settings, i)
            donated = None if donated is None else without(donated, i)
        with (
            torch.no_grad(),
            compiling_backward(self._context, self._compile_id),
            donating(self._context, donated),
            aligned_host_inputs(len(flags) > 1),
            reported_strides(self._context) as reported,
        ):
            self.log.version(name)
            note()
            run = self._compile(gm, [*inputs, *flags], **settings)
            strides += reported
            return run


def identity_of(source: BackwardSource, compiled: Any, *more: Any) -> str | None:
    """A hash of all that versions are made of; None where Inductor has no key for what was compiled of the source.

    more: what they depend on beside.
    """
    key = key_of(compiled)
    if key is None:
        return None
    sizes = [hint_of(value) for value in source.inputs if isinstance(value, torch.SymInt)]
    return digest([package_key(), *key, source.donated, *more, sizes])


def plain_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those that mean the same in another process."""
    return {name: value for name, value in settings.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    of_ints = isinstance(value, (list, tuple, range)) and all(type(each) is int for each in value)
    return of_ints or value is None or type(value) in (bool, str)


class StoredSource(BackwardSource):
    """One that was pickled by the process that traced the graph; read when something is made of it."""

    def __init__(
        self,
        content: bytes,
        settings: dict[str, Any],
        *,
        donated: list[int] | None,
        compile_inner: Compile,
        compile_log: CompileLog,
    ) -> None:
        self._content = content
        self._surroundings(settings, donated, compile_inner, compile_log, None)

    @cached_property
    def module(self) -> fx.GraphModule:
        return self._read[0]

    @cached_property
    def inputs(self) -> Sequence[Any]:  # type: ignore[override]
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[fx.GraphModule, Sequence[Any]]:
        (module, inputs), mode = unpickle_graph(self._content)
        module.recompile()
        self._context = late_context(mode, self.donated)
        return module, inputs

    def stored(self) -> bytes:
        return self._content
