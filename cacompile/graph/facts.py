"""What a cache holds of a graph beside compiled code; plain values, which torch pickles with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cacompile.layout import MaskLayout, StaysDense
from cacompile.passes.plan import Plan


@dataclass(frozen=True, slots=True)
class LeanFacts:
    """Of one forward: all that the forwards that save less are made of later."""

    spared: dict[str, int]
    """Inputs of the backward for which alone the forward computes an output -> the place of that output."""
    strides: list[tuple[str, ...] | None]
    """Of the whole forward's outputs, for which backwards are compiled."""
    settings: dict[str, Any]
    """What the last step of the compiler was called with; not what lives in one process only."""
    source: bytes
    """The graph as it came, without the handle, and its inputs, pickled."""
    versions: str
    """Under what they are cached."""


@dataclass(frozen=True, slots=True)
class ForwardFacts:
    """Of one compiled graph, for the process that finds it in the cache."""

    handle: int
    """Position of the handle among the forward's inputs."""
    saved_at: int | None
    """Position of the handle among its outputs, where it is saved for the backward."""
    plan: Plan
    """Without nodes."""
    layout: MaskLayout
    lean: LeanFacts | None = None
    """None where its forward can only run whole."""


@dataclass(frozen=True, slots=True)
class BackwardFacts:
    """Of one backward, likewise: all that its versions are made of later."""

    handle: int
    slot: int | None
    """Position of the handle among its outputs."""
    plan: Plan
    layout: MaskLayout
    places: dict[int, int]
    deepest: list[int]
    device: str
    """Where the weights are."""
    donated: list[int] | None
    settings: dict[str, Any]
    """What the last step of the compiler was called with; not what lives in one process only."""
    source: bytes
    """The graph as it came, and its inputs, pickled."""
    versions: str
    """Under what its later versions are cached."""


@dataclass(frozen=True, slots=True)
class VersionFacts:
    """What is known of a version beside its code."""

    masked: tuple[str, ...]
    """Parameters whose products it masks."""
    dense: tuple[StaysDense, ...]
    """What stays dense in the end."""
    nodes: int = 0
    """How many nodes its graph had."""
    unread: dict[int, str] = field(default_factory=dict)
    """Inputs of the backward that its graph has not: positions and names."""
