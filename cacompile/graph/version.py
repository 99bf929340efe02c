"""One compiled version of a graph, and the choice of the one that runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

Run = Callable[[list[Any]], Any]


class Version(NamedTuple):
    """One version, and what it leaves out; one value, so that no thread sees half of it."""

    run: Run
    masked: frozenset[str] = frozenset()
    """Parameters whose products it masks; if there are any, the flags are its last input."""
    host: bool = False
    """Whether it takes the flags in CPU memory too."""
    truncated: frozenset[int] = frozenset()
    """Places of its output that are None."""
    nodes: int = 0
    """How many nodes its graph had."""
    unread: frozenset[str] = frozenset()
    """Names of the graph's inputs that it does not read."""

    @property
    def name(self) -> str:
        """What logs and traces call it."""
        parts = ["truncated"] * bool(self.truncated) + ["masked"] * bool(self.masked)
        return " and ".join(parts) or "dense"


class Choice(NamedTuple):
    """What runs in one backward."""

    version: Version
    flags: np.ndarray | None = None
    """Of a masked version, on the host."""
    none: frozenset[int] = frozenset()
    """Places of gradients that nobody is to get."""
    zeros: tuple[tuple[int, torch.Tensor], ...] = ()
    """Places of gradients that are skipped whole, though the version has none for them, or that nobody is to get but
    hooks wait for; and their parameters."""
