"""What AOTAutograd's cache holds of our graphs. Torch pickles it, and reads it; on a hit none of our passes runs."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from cacompile.torch_internals import (
    AOTAutogradCacheBypass,
    OutputCode,
    StorableFxGraph,
    boxed,
    load_code,
    storable,
)

from .facts import BackwardFacts, ForwardFacts, LeanFacts
from .handle import Instead, around_handle


class Compilation(Protocol):
    """The graph that is being compiled while torch looks into its cache."""

    def load_forward(self, facts: ForwardFacts, settings: dict[str, Any]) -> Instead: ...

    def load_backward(
        self, facts: BackwardFacts, dense: Callable[[list[Any]], Any], settings: dict[str, Any]
    ) -> Callable[[list[Any]], Any]: ...


compiling: contextvars.ContextVar[Compilation] = contextvars.ContextVar("compiling")
"""Unset where torch loads an entry on its own account: such a load fails, for nobody would give the handle."""


class StoredForward(StorableFxGraph):
    """Inductor's code of a forward, and the handle, which it does not see; and what lean forwards are made of."""

    convaware: ForwardFacts
    convaware_lean: Any

    @classmethod
    def of(cls, code: Any, facts: ForwardFacts, lean: Callable[[], LeanFacts | None]) -> StoredForward:
        """The code itself, which takes the handle already. lean: what is asked for when it is pickled."""
        code.__class__ = cls
        code.convaware, code.convaware_lean = facts, lean
        return code

    def prepare_for_serialization(self) -> None:
        """Called by torch on a copy that it is to pickle."""
        super().prepare_for_serialization()
        self.convaware = replace(self.convaware, lean=self.convaware_lean())
        self.convaware_lean = None

    def post_compile(self, example_inputs: Sequence[Any], constants: Any, graph_kwargs: Any) -> None:
        """Called on a hit."""
        graph, facts = compiling.get(), self.convaware
        at = facts.handle
        super().post_compile([*example_inputs[:at], *example_inputs[at + 1 :]], constants, graph_kwargs)
        settings = {**(facts.lean.settings if facts.lean is not None else {}), **graph_kwargs}
        around_handle(self, at, facts.saved_at, instead=graph.load_forward(facts, settings))


class StoredBackward(OutputCode):
    """The versions of a backward; pickled, its dense version, and what the others are made of."""

    def __init__(self, run: Callable[[list[Any]], Any], store: Callable[[], tuple[BackwardFacts, Any]]) -> None:
        """store: what there is to save, and the dense version's code; raises whatever it likes where it cannot."""
        self.run: Any = run
        self.store: Any = store
        self.saved: tuple[BackwardFacts, Any] | None = None
        boxed(self)

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
        self.run = graph.load_backward(facts, load_code(code, example_inputs, settings), settings)
        self.saved = None


class Unstored(OutputCode):
    """A compiled graph that is no code of Inductor's, such as one without operations: not to be cached."""

    def __init__(self, run: Callable[[list[Any]], Any]) -> None:
        self.run = run
        boxed(self)

    def __call__(self, inputs: Any) -> Any:
        return self.run(inputs)

    def prepare_for_serialization(self) -> None:
        raise AOTAutogradCacheBypass("Inductor makes no code of one of its graphs")
