"""What AOTAutograd's cache holds of our graphs. Torch pickles it, and reads it; on a hit none of our passes runs."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cacompile.torch_internals import AOTAutogradCacheBypass, CompiledFxGraph, OutputCode
from cacompile.torch_internals_cache import load, storable

from .facts import BackwardFacts, ForwardFacts
from .handle import around_handle


class Compilation(Protocol):
    """The graph that is being compiled while torch looks into its cache."""

    def load_forward(self, facts: ForwardFacts) -> None: ...

    def load_backward(
        self, facts: BackwardFacts, dense: Callable[[list[Any]], Any], settings: dict[str, Any]
    ) -> Callable[[list[Any]], Any]: ...


compiling: contextvars.ContextVar[Compilation] = contextvars.ContextVar("compiling")
"""Unset where torch loads an entry on its own account: such a load fails, for nobody would give the handle."""


class StoredForward(CompiledFxGraph):
    """Inductor's code of a forward, and the handle, which it does not see."""

    convaware: ForwardFacts
    current_callable: Any

    @classmethod
    def of(cls, code: Any, facts: ForwardFacts) -> StoredForward:
        """The code itself, which from now on knows of the handle."""
        code.__class__ = cls
        code.convaware = facts
        code._take_handle()
        return code

    def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Any) -> None:
        """Called on a hit."""
        graph = compiling.get()
        at = self.convaware.handle
        super().post_compile([*example_inputs[:at], *example_inputs[at + 1 :]], constants, graph_kwargs)
        self._take_handle()
        graph.load_forward(self.convaware)

    def _take_handle(self) -> None:
        self.current_callable = around_handle(self.current_callable, self.convaware.handle, self.convaware.saved_at)


class StoredBackward(OutputCode):
    """The versions of a backward; pickled, its dense version, and what the others are made of."""

    def __init__(self, run: Callable[[list[Any]], Any], store: Callable[[], tuple[BackwardFacts, Any]]) -> None:
        """store: what there is to save, and the dense version's code; raises whatever it likes where it cannot."""
        self.run: Any = run
        self.store: Any = store
        self.saved: tuple[BackwardFacts, Any] | None = None
        self._boxed_call = True

    def __call__(self, inputs: Any) -> Any:
        return self.run(inputs)

    def prepare_for_serialization(self) -> None:
        """Called by torch on a copy that it is to pickle."""
        try:
            facts, dense = self.store()
            self.saved = facts, storable(dense)
        except Exception as error:
            raise AOTAutogradCacheBypass(f"its backward cannot be pickled: {error}") from error
        self.run = self.store = None

    def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Any) -> None:
        """Called on a hit."""
        assert self.saved is not None
        graph = compiling.get()
        facts, code = self.saved
        settings = {**facts.settings, **graph_kwargs}
        self.run = graph.load_backward(facts, load(code, example_inputs, settings), settings)
        self.saved = None


class Unstored(OutputCode):
    """A compiled graph that is no code of Inductor's, such as one without operations: not to be cached."""

    def __init__(self, run: Callable[[list[Any]], Any]) -> None:
        self.run = run
        self._boxed_call = True

    def __call__(self, inputs: Any) -> Any:
        return self.run(inputs)

    def prepare_for_serialization(self) -> None:
        raise AOTAutogradCacheBypass("Inductor makes no code of one of its graphs")
