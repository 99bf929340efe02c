"""Numbers that name parameters in random draws and fix their order: the same on every rank."""

from __future__ import annotations

import zlib
from collections import Counter

_names: Counter[str] = Counter()
"""How many parameters graphs have called so since the last step of an optimizer of ours. Blocks of one model are met in
one forward, before it is stepped: what a process has trained before, which another has not, changes none of their keys.
What is met later, or after another model that never was stepped, may get a key that another has, or a higher one.
"""


def new_key(name: str) -> int:
    """A number for a parameter that a graph calls `name`; identical blocks call theirs alike: they are counted."""
    place = _names[name]
    _names[name] = place + 1
    return key_of(name, place)


def key_of(name: str, place: int) -> int:
    """The number of the parameter of this name that is in this place, among those of the name or of the model."""
    return zlib.crc32(name.encode()) + (place << 32)


def forget_keys() -> None:
    """Names count from zero again."""
    _names.clear()
