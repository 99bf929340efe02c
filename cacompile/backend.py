"""The front door: `torch.compile(model, backend="convaware")`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import ShortenTraceback
from torch._inductor import config as inductor_config
from torch._inductor import list_mode_options

from .config import Config
from .errors import ConvAwareError, unknown
from .inner import inner_of
from .joint import has_trainable
from .region import compile_region

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class OptionError(ShortenTraceback, ConvAwareError):
    """A wrong option; of the kind that Dynamo hands to the user as it is."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)  # type: ignore[call-arg]


def convaware(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile Dynamo's graph, with Inductor or `inner`, so that weight gradients of converged groups can be skipped.

    mode: as Inductor's. options: ours (see `Config`) and Inductor's, mixed. Raises ValueError for any other, and for
    Inductor's beside another inner compiler.
    """
    try:
        config, patches = _settings(mode, options)
    except ConvAwareError as error:
        raise OptionError(str(error)) from None
    if not (torch.is_grad_enabled() and has_trainable(example_inputs)):
        return inner_of(config, patches).alone(gm, example_inputs)
    region, compiled = compile_region(gm, example_inputs, config, patches)
    return region.bind(compiled)


def _reset() -> None:
    from torch._inductor import cudagraph_trees

    from .runtime.tracked import registry

    cudagraph_trees.reset_cudagraph_trees()
    registry.forget()


convaware.reset = _reset  # type: ignore[attr-defined]  # called by torch._dynamo.reset()


def _settings(mode: str | None, options: Mapping[str, Any] | None) -> tuple[Config, dict[str, Any]]:
    """Our Config, and the patches of Inductor's configuration that mode and options ask for."""
    if mode is not None and mode not in MODES:
        raise unknown("mode", mode, MODES)
    config, theirs = Config.from_options(options)
    if config.inner != "inductor" and (mode not in (None, "default") or theirs):
        wrong = f"mode {mode!r}" if mode not in (None, "default") else f"option {next(iter(theirs))!r}"
        allowed = ", ".join(sorted(Config.__dataclass_fields__))
        raise ConvAwareError(f"{wrong} is Inductor's, which inner={config.inner!r} does not use; allowed: {allowed}")
    known = inductor_config.get_config_copy()
    patches = dict(list_mode_options(mode)) if mode not in (None, "default") else {}
    for name, value in theirs.items():
        key = name.replace("-", "_")
        if key not in known:
            raise unknown("option", name, {*known, *Config.__dataclass_fields__})
        try:
            torch._TorchCompileInductorWrapper(None, {name: value}, None)
        except RuntimeError as error:
            raise ConvAwareError(f"option {name!r} cannot be {value!r}: {error}") from None
        patches[key] = value
    return config, patches
