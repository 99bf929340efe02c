"""Repeated layers told once: names that differ in numbers, and what is alike."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

_NUMBER = re.compile(r"(\d+)")


def fold(items: Iterable[Item], likeness: Callable[[Item], Hashable]) -> list[tuple[Item, ...]]:
    """What is alike, together, where the first of it is: the same role in repeated layers."""
    runs: dict[Hashable, list[Item]] = {}
    for item in items:
        runs.setdefault(likeness(item), []).append(item)
    return [tuple(run) for run in runs.values()]


def pattern(name: str) -> str:
    """A name without its numbers, which tell repeated layers apart: `layers.#.mlp`."""
    return _NUMBER.sub("#", name)


def fold_name(names: Sequence[str]) -> str:
    """`layers.{0..3}.mlp` for `layers.0.mlp` to `layers.3.mlp`; the first name where more than numbers differ."""
    if len({pattern(name) for name in names}) > 1:
        return names[0]
    columns = zip(*map(_NUMBER.split, names))
    return "".join(_braces(list(dict.fromkeys(parts))) for parts in columns)


def _braces(parts: list[str]) -> str:
    """`{0..3}`, `{0,2..8}` or `{0,1,4}`; what there is one of without braces."""
    if len(parts) == 1:
        return parts[0]
    numbers = [int(part) for part in parts]
    step = numbers[1] - numbers[0]
    if len(parts) > 2 and step > 0 and numbers == list(range(numbers[0], numbers[-1] + 1, step)):
        if step == 1:
            return f"{{{parts[0]}..{parts[-1]}}}"
        if len(parts) > 4:
            return f"{{{parts[0]},{parts[1]}..{parts[-1]}}}"
    return f"{{{','.join(parts)}}}"
