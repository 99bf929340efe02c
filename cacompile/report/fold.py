"""Repeated layers, told once: what comes again and again under names that differ in one number."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

_NUMBER = re.compile(r"(\d+)")


def fold(
    items: Sequence[Item], name: Callable[[Item], str], likeness: Callable[[Item], Hashable]
) -> list[tuple[Item, ...]]:
    """Each tuple can be told as one: its items are alike and come from consecutive repeats of the same pattern.

    A pattern may be several items long: heads, neurons, heads, neurons make two tuples. In each repeat one number of
    every name is higher than in the repeat before; patterns that overlap in it, such as the second half of one layer
    with the first half of the next, do not count. Repeats within repeats, such as experts in layers, fold as well.
    """
    runs: list[tuple[Item, ...]] = [(item,) for item in items]
    while True:
        shorter = _fold(runs, lambda run: name(run[0]), lambda run: (len(run), likeness(run[0])))
        if len(shorter) == len(runs):
            return runs
        runs = [tuple(item for run in part for item in run) for part in shorter]


def gather(
    items: Sequence[Item], name: Callable[[Item], str], likeness: Callable[[Item], Hashable]
) -> list[tuple[Item, ...]]:
    """As `fold`, wherever among the items the like ones are."""
    texts = {id(item): _NUMBER.split(name(item)) for item in items}
    runs: list[tuple[Item, ...]] = [(item,) for item in items]
    for place in range(1, max(map(len, texts.values()), default=0), 2):
        alike: dict[Hashable, list[Item]] = {}
        for run in runs:
            text = texts[id(run[0])]
            own = len(run) > 1 or place >= len(text)
            rest = tuple(text) if own else (*text[:place], None, *text[place + 1 :])
            alike.setdefault((len(run), rest, likeness(run[0])), []).extend(run)
        runs = [tuple(found) for found in alike.values()]
    return runs


def fold_name(names: Sequence[str]) -> str:
    """`layers.{0..3}.mlp` for `layers.0.mlp` to `layers.3.mlp`; the first name where more than numbers differ."""
    texts = [_NUMBER.split(name) for name in names]
    if len({tuple(text[::2]) for text in texts}) > 1:
        return names[0]
    return "".join(_braces(list(dict.fromkeys(parts))) for parts in zip(*texts))


def _fold(
    items: Sequence[Item], name: Callable[[Item], str], likeness: Callable[[Item], Hashable]
) -> list[tuple[Item, ...]]:
    """The pattern that covers most is folded first, then what is before it and behind it."""
    texts = [_NUMBER.split(name(item)) for item in items]
    keys = [(likeness(item), tuple(text[::2])) for item, text in zip(items, texts)]

    def part(low: int, high: int) -> list[tuple[Item, ...]]:
        start, period, repeats = _longest(keys, texts, low, high)
        if repeats == 1:
            return [(item,) for item in items[low:high]]
        runs = [tuple(items[first + period * k] for k in range(repeats)) for first in range(start, start + period)]
        return [*part(low, start), *runs, *part(start + period * repeats, high)]

    return part(0, len(items))


def _longest(keys: Sequence[Hashable], texts: Sequence[list[str]], low: int, high: int) -> tuple[int, int, int]:
    """(start, items, repeats) of the pattern that covers most within `low:high`; of equals the shortest, the first."""
    best = low, 1, 1
    for period in range(1, (high - low) // 2 + 1):
        start = low
        while start + 2 * period <= high:
            repeats = _repeats(keys, texts, start, period, high)
            if repeats > 1 and repeats * period > best[1] * best[2]:
                best = start, period, repeats
            start += max(1, period * (repeats - 1))
    return best


def _repeats(keys: Sequence[Hashable], texts: Sequence[list[str]], start: int, period: int, high: int) -> int:
    places: list[int] = []
    repeats = 1
    while (there := start + repeats * period) + period <= high:
        found, old, new = [], [], []
        for k in range(there, there + period):
            if keys[k - period] != keys[k]:
                return repeats
            differ = [place for place, (a, b) in enumerate(zip(texts[k - period], texts[k])) if a != b]
            if len(differ) != 1:
                return repeats
            found += differ
            old.append(int(texts[k - period][differ[0]]))
            new.append(int(texts[k][differ[0]]))
        if max(old) >= min(new) or found != (places := places or found):
            return repeats
        repeats += 1
    return repeats


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
