"""What compiles the graphs under us: Inductor, AOTAutograd with an eager run, or the compiler of a vendor."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import fx

from cacompile.config import Config
from cacompile.torch_internals import (
    AotAutograd,
    aot_autograd,
    boxed,
    compile_fx,
    compile_fx_inner,
    in_own_cache,
    inductor_config,
    is_boxed,
    lookup_backend,
)

Compile = Callable[..., Callable[[list[Any]], Any]]
"""Inductor's `compile_fx_inner`, or one with its signature: (graph, inputs, is_backward=..., ...) -> boxed callable."""

Hooked = Callable[[fx.GraphModule, Sequence[Any], Compile], Callable[..., Any]]
"""(Dynamo's graph, inputs, what to call in place of `compile`) -> the compiled graph."""


@dataclass(frozen=True, slots=True)
class Inner:
    """One compiler: its whole pipeline, and its last step, which turns a finished graph into a callable."""

    compile: Compile
    """The last step: of a forward graph, or of any version of a backward graph, however late."""
    pipeline: Hooked
    """All of it, with the last step left to another."""
    alone: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
    """All of it, as if we were not there."""
    captured: Callable[[], bool]
    """Whether what it compiles may be recorded into a CUDA graph, where nothing on the host can decide."""
    patched: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
    """Inductor's configuration while it compiles."""


def inner_of(config: Config, patches: Mapping[str, Any], compile_inner: Compile | None = None) -> Inner:
    """The compiler that the options ask for. patches: of Inductor's configuration; compile_inner: another last step."""
    if config.inner == "inductor":
        return _inductor(dict(patches), compile_inner or compile_fx_inner)
    if config.inner == "aot_eager":
        return _eager(compile_inner)
    settings = config.inner.kwargs if isinstance(config.inner, AotAutograd) else {"fw_compiler": config.inner}
    return _vendor(settings, compile_inner)


def _inductor(patches: dict[str, Any], last: Compile) -> Inner:
    return Inner(
        # versions are compiled late, when compile_fx's own patches are over
        compile=in_own_cache(inductor_config.patch(patches)(last) if patches else last),
        pipeline=lambda gm, inputs, hook: compile_fx(gm, inputs, inner_compile=hook, config_patches=patches),
        alone=lambda gm, inputs: compile_fx(gm, inputs, config_patches=patches),
        captured=lambda: bool(inductor_config.triton.cudagraphs),
        patched=lambda: inductor_config.patch(patches) if patches else contextlib.nullcontext(),
    )


def _eager(last: Compile | None) -> Inner:
    from cacompile.torch_internals import boxed_nop

    backend: Any = lookup_backend("aot_eager")

    def pipeline(gm: fx.GraphModule, inputs: Sequence[Any], hook: Compile) -> Callable[..., Any]:
        backward = functools.partial(hook, is_backward=True, cudagraphs=False)
        return backend(gm, inputs, fw_compiler=hook, bw_compiler=backward)

    return Inner(
        compile=last or _last_step({"fw_compiler": boxed_nop}), pipeline=pipeline, alone=backend, captured=lambda: False
    )


def _vendor(settings: Mapping[str, Any], last: Compile | None) -> Inner:
    """settings: of `aot_autograd`. Nobody knows what a vendor's compiler records, so the host decides nothing."""

    def pipeline(gm: fx.GraphModule, inputs: Sequence[Any], hook: Compile) -> Callable[..., Any]:
        hooks = {
            "fw_compiler": hook,
            "bw_compiler": functools.partial(hook, is_backward=True),
            "inference_compiler": functools.partial(hook, is_inference=True),
        }
        return aot_autograd(**{**settings, **hooks})(gm, inputs)

    return Inner(
        compile=last or _last_step(settings), pipeline=pipeline, alone=aot_autograd(**settings), captured=lambda: True
    )


def _last_step(settings: Mapping[str, Any]) -> Compile:
    """Compilers of `aot_autograd` in the clothes of `compile_fx_inner`."""
    forward = settings["fw_compiler"]
    backward = settings.get("bw_compiler") or forward
    inference = settings.get("inference_compiler") or forward

    def compile_graph(
        gm: fx.GraphModule, inputs: Sequence[Any], *, is_backward: bool = False, is_inference: bool = False, **_: Any
    ) -> Callable[[list[Any]], Any]:
        return _boxed((backward if is_backward else inference if is_inference else forward)(gm, list(inputs)))

    return compile_graph


def _boxed(compiled: Any) -> Callable[[list[Any]], Any]:
    """A callable that takes its arguments as one list, and so may free them while it runs."""
    if is_boxed(compiled):
        return compiled

    def run(args: list[Any]) -> Any:
        return compiled(*args)

    return boxed(run)
