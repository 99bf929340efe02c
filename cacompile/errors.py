"""The few exceptions a user can meet."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable


class ConvAwareError(ValueError):
    """Something the user gave is wrong; the message names it, its value and what is allowed."""


def unknown(kind: str, name: object, known: Iterable[str]) -> ConvAwareError:
    """The error for a name that does not exist, with the nearest one that does."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    shown = names if len(names) <= 20 else [*difflib.get_close_matches(str(name), names, n=5, cutoff=0.4), "..."]
    return ConvAwareError(f"unknown {kind} {name!r}; {hint}known: {', '.join(shown)}")


def renamed(old: str, new: str, depth: int = 0) -> None:
    """Warn that a public name is called otherwise now; the old one goes with the next version.

    depth: calls between the function that asks for this and the one that the user has called.
    """
    warnings.warn(
        f"{old} is now {new}; the old name goes with the next version", DeprecationWarning, stacklevel=3 + depth
    )
