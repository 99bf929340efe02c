"""What is asked of a compilation: our options and Inductor's, mixed, as `torch.compile` takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import Config
from .errors import ConvAwareError, shown, unknown

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")

Settings = tuple[Config, dict[str, Any]]
"""Our Config, and patches of Inductor's configuration."""


def settings(options: Mapping[str, Any] | None, mode: str | None = None) -> Settings:
    """Our Config, and the patches of Inductor's configuration that mode and options ask for.

    Raises ConvAwareError for an option or a value that there is not, and for one of Inductor's beside another `inner`.
    """
    from .torch_internals import check_inductor_option, inductor_config, list_mode_options

    if mode is not None and mode not in MODES:
        raise unknown("mode", mode, MODES)
    config, theirs = Config.from_options(options)
    if config.inner != "inductor" and (mode not in (None, "default") or theirs):
        wrong = f"mode {mode!r}" if mode not in (None, "default") else f"option {next(iter(theirs))!r}"
        allowed = ", ".join(sorted(Config.__dataclass_fields__))
        raise ConvAwareError(
            f"{wrong} is Inductor's, which inner={shown(config.inner)} does not use; allowed: {allowed}"
        )
    known = inductor_config.get_config_copy()
    patches = dict(list_mode_options(mode)) if mode not in (None, "default") else {}
    for name, value in theirs.items():
        key = name.replace("-", "_")
        if key not in known:
            raise unknown("option", name, Config.__dataclass_fields__, others=known)
        try:
            check_inductor_option(name, value)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            raise ConvAwareError(f"option {name!r} cannot be {shown(value)}: {error}") from None
        patches[key] = value
    return config, patches
