"""What a user may set, each option with its range and default: the one place where they live."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import ConvAwareError, shown, unknown

LARGEST = 2**63 - 1
"""The largest int that may be given for a number of steps: of those that arrays hold."""

LARGEST_SEED = 2**64 - 1


def _option(
    default: Any,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple = (),
    callables: str = "",
    patterns: bool = False,
    largest: int = LARGEST,
) -> Any:
    """callables: what a callable is that may stand in place of a choice; empty where none may.

    patterns: whether it is a tuple of names and patterns.
    largest: the largest int where there is no `high`, too large to be worth a word in the tables of options.
    """
    allowed = {"low": low, "high": high, "choices": choices, "callables": callables, "largest": largest}
    allowed["patterns"] = patterns
    return field(default=default, metadata={"doc": doc, **allowed})


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Options of the convaware backend, checked when made; hashable, so that it can key caches."""

    tolerance: float = _option(
        0.05,
        "Share of a step's expected loss decrease that may be given up; 0 never skips, above the default more pays.",
        low=0.0,
        high=1.0,
    )
    budget: float = _option(
        0.0,
        "Share of a step's FLOPs to save, as far as it goes, where it costs least; 0 saves what is worth its price.",
        low=0.0,
        high=1.0,
    )
    max_skip: float = _option(0.8, "Largest share of the steps in which a group may be skipped.", low=0.0, high=1.0)
    warmup_steps: int = _option(20, "Optimizer steps before anything is skipped.", low=0)
    monitor_every: int = _option(20, "Optimizer steps between two measurements of the scores.", low=1)
    max_age: int = _option(20, "Most optimizer steps in a row that a group may be skipped.", low=1)
    block_rows: int = _option(
        128,
        "Rows of a weight in one group, about (filters: half, tokens: four times); no head is ever cut.",
        low=1,
        high=65536,
    )
    estimate: str = _option(
        "momentum",
        "Gradient of a skipped group: the optimizer's first moment, or zeros.",
        choices=("momentum", "zeros"),
    )
    keep: tuple[str, ...] = _option(
        (), "What is never skipped: names of parameters, modules, families, groups, or patterns.", patterns=True
    )
    frozen: tuple[str, ...] = _option(
        (), "What is frozen at the start, until `session.thaw`: names or patterns, as of `keep`.", patterns=True
    )
    max_truncated: int = _option(
        8, "Most backwards of a graph, each for other frozen parameters, in memory at a time; 0 cuts none.", low=0
    )
    switch: str = _option(
        "at once",
        "When a new version of the backward is taken: at once, which waits for the compiler, or when a thread has "
        "compiled it; until then all is computed, for as many steps as that happens to take.",
        choices=("at once", "when compiled"),
    )
    seed: int = _option(0, "Seed of the draws; give every data-parallel rank the same.", low=0, largest=LARGEST_SEED)
    inner: str | Callable[..., Any] = _option(  # noqa: RUF009  # a value like any other, for all its type
        "inductor",
        "What compiles the graphs: Inductor, torch's eager run of them, or another compiler.",
        choices=("inductor", "aot_eager"),
        callables="a compiler `(graph, inputs) -> callable`",
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            value = _checked(option.name, getattr(self, option.name), option.default, option.metadata)
            object.__setattr__(self, option.name, value)

    @classmethod
    def from_options(cls, options: Mapping[str, Any] | None) -> tuple[Config, dict[str, Any]]:
        """Split torch.compile's `options` into ours and the rest, which is Inductor's."""
        ours = {option.name for option in fields(cls)}
        if options is not None and not isinstance(options, Mapping):
            raise ConvAwareError(f"options must be a dict of names and values, got {shown(options)}")
        options = dict(options or {})
        if wrong := [name for name in options if not isinstance(name, str)]:
            raise ConvAwareError(f"names of options must be of type str, got {shown(wrong[0])}")
        return cls(**{k: v for k, v in options.items() if k in ours}), {
            k: v for k, v in options.items() if k not in ours
        }


def _checked(name: str, value: Any, default: Any, allowed: Mapping[str, Any]) -> Any:
    """The value, numbers as Python's own: a saved state has the options, and no objects of other libraries."""
    if allowed["callables"] and callable(value):
        _check_key(name, value)
        return value
    if allowed["patterns"]:
        return _checked_patterns(name, value)
    kind = type(default)
    fits = isinstance(value, {float: numbers.Real, int: numbers.Integral}.get(kind, kind))
    if not fits or isinstance(value, bool):
        also = f" or {allowed['callables']}" if allowed["callables"] else ""
        raise ConvAwareError(f"convaware option {name!r} must be of type {kind.__name__}{also}, got {shown(value)}")
    low, high, choices = allowed["low"], allowed["high"], allowed["choices"]
    if choices and value not in choices:
        also = f"; or {allowed['callables']}" if allowed["callables"] else ""
        raise ConvAwareError(f"{unknown(f'value of convaware option {name!r}:', value, choices)}{also}")
    if choices:
        return value
    if not low <= value <= (allowed["largest"] if high is None else high):
        far = high is None and value > low
        span = f"between {low} and {allowed['largest'] if far else high}" if high is not None or far else f">= {low}"
        raise ConvAwareError(f"convaware option {name!r} must be {span}, got {shown(value)}")
    return kind(value)


def _checked_patterns(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(each, str) for each in value):
        raise ConvAwareError(f"convaware option {name!r} must be a tuple of names and patterns, got {shown(value)}")
    return tuple(value)


def _check_key(name: str, value: Any) -> None:
    try:
        hash(value)
    except TypeError:
        raise ConvAwareError(f"convaware option {name!r} must be hashable, got {shown(value)}") from None
