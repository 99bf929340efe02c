"""The few exceptions a user can meet."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable


class ConvAwareError(ValueError):
    """Something the user gave is wrong; the message names it, its value and what is allowed."""


LONGEST = 300
"""Most characters of a value that a message shows."""


def shown(value: object) -> str:
    """A value as a message has it: on one line and never too long, whatever it is."""
    try:
        text = " ".join(line.strip() for line in repr(value).splitlines())
    except Exception:  # such as an int of thousands of digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def unknown(kind: str, name: object, known: Iterable[str], others: Iterable[str] = ()) -> ConvAwareError:
    """The error for a name that does not exist, with the nearest one that does.

    others: names that exist as well, of which only the nearest is worth a word.
    """
    names, text = sorted(known), name if isinstance(name, str) else shown(name)
    near = difflib.get_close_matches(text, names, n=1) or difflib.get_close_matches(text, sorted(others), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    some = names if len(names) <= 20 else [*difflib.get_close_matches(text, names, n=5, cutoff=0.4), "..."]
    return ConvAwareError(f"unknown {kind} {shown(name)}; {hint}known: {', '.join(some)}")


def renamed(old: str, new: str, depth: int = 0) -> None:
    """Warn that a public name is called otherwise now; the old one goes with the next version.

    depth: calls between the function that asks for this and the one that the user has called.
    """
    warnings.warn(
        f"{old} is now {new}; the old name goes with the next version", DeprecationWarning, stacklevel=3 + depth
    )
