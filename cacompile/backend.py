"""The front door: `torch.compile(model, backend="convaware")`."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .config import Config
from .errors import ConvAwareError
from .graph.fallback import warn_of_fault
from .hooks.counting import count_steps
from .settings import Settings, settings
from .torch_internals import (
    COMPILE,
    TESTED,
    broken_contracts,
    imported,
    inductor_alone,
    is_control_flow,
    release,
    warning_once,
)

log = logging.getLogger(__name__)

count_steps()

PLAIN = "this graph is compiled by the inner compiler alone, and all its weight gradients are computed"


MADE_ANEW = (
    "%s is no parameter, but a tensor that is made anew for each forward pass, as FullyShardedDataParallel (FSDP1) and "
    "DistributedDataParallel around tensor parallel have them: of such weights nothing is skipped. Use fully_shard "
    "(FSDP2), or one of the two alone"
)


def convaware(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile Dynamo's graph, with Inductor or `inner`, so that weight gradients of converged groups can be skipped.

    mode: as Inductor's. options: ours (see `Config`) and Inductor's, mixed. Raises ValueError for any other, and for
    Inductor's beside another inner compiler. Whatever of ours fails, the graph is compiled by the inner compiler alone.
    """
    if broken := broken_contracts(COMPILE):
        warn_of_fault(log, f"relying on torch, where {'; '.join(map(str, broken))}", PLAIN, trace=False)
        config, theirs = _or_option_error(Config.from_options, options)
        return _plain(gm, example_inputs, config, {name.replace("-", "_"): value for name, value in theirs.items()})
    config, patches = _or_option_error(settings, options, mode)
    if release() not in TESTED:
        _note_untested()
    try:
        from .graph.compiled import compile_graph  # inside the net
        from .passes.joint import has_trainable, made_anew

        if torch.is_grad_enabled():
            if has_trainable(example_inputs):
                ours, compiled = compile_graph(gm, example_inputs, config, patches)
                return ours.bind(compiled)
            if names := made_anew(gm, example_inputs):
                warning_once(log, MADE_ANEW, names[0])
    except Exception as error:
        if is_control_flow(error):
            raise
        # what the inner compiler itself cannot do it says now
        plain = _plain(gm, example_inputs, config, patches)
        warn_of_fault(log, "compiling a graph", PLAIN)
        return plain
    return _plain(gm, example_inputs, config, patches)


def _reset() -> None:
    """Called by `torch._dynamo.reset()` amid its list of backends, to which an import may add: nothing is imported."""
    if (trees := imported("cudagraph_trees")) is not None:
        trees.reset_cudagraph_trees()
    if (home := sys.modules.get(f"{__package__}.state.registry")) is not None:
        home.registry.forget()


convaware.reset = _reset  # type: ignore[attr-defined]


def _plain(
    gm: fx.GraphModule, example_inputs: Sequence[Any], config: Config, patches: dict[str, Any]
) -> Callable[..., Any]:
    """The graph as the inner compiler alone compiles it."""
    if config.inner == "inductor":
        return inductor_alone(gm, example_inputs, patches)
    from .graph.inner import inner_of

    return inner_of(config, patches).alone(gm, example_inputs)


@functools.cache
def _note_untested() -> None:
    log.warning(
        "torch %s is not among the releases that cacompile was tested on (%s). What it needs of torch is there, so it "
        "goes on; `python -m cacompile doctor --test` compiles and trains a small model",
        torch.__version__,
        ", ".join(TESTED),
    )


def _or_option_error(read: Callable[..., Settings], *given: Any) -> Settings:
    """What is read of mode and options; a wrong one's error is of the kind that Dynamo hands to the user as it is."""
    try:
        return read(*given)
    except ConvAwareError as error:
        message = str(error)
    from .torch_internals import ShortenTraceback

    class OptionError(ShortenTraceback, ConvAwareError):
        def __init__(self, message: str) -> None:
            super().__init__(message, first_useful_frame=None)  # type: ignore[call-arg]

    raise OptionError(message)
