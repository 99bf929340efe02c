"""Families of groups as people are told of them, and repeated layers told once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cacompile.passes.plan import Slice

from .facts import ExplainedGroup, Facts

Item = TypeVar("Item")

_NUMBER = re.compile(r"(\d+)")
_RANGE = re.compile(r"\[(\d+)(?::(\d+))?\]$")


@dataclass(frozen=True, slots=True)
class ExplainedFamily:
    """All groups of one family, with the parameters that are drawn with it."""

    name: str
    groups: tuple[ExplainedGroup, ...]
    params: tuple[str, ...]
    elsewhere: tuple[str, ...] = ()
    """Parameters that have slices in it, but more in another family."""

    @property
    def kind(self) -> str:
        return self.groups[0].kind

    @property
    def count(self) -> int:
        """Groups; one that several graphs have counts once."""
        return len({group.name for group in self.groups})

    @property
    def share(self) -> float:
        """Of all dW FLOPs, 0 to 1."""
        return sum(group.share for group in self.groups)

    @property
    def units(self) -> str:
        """`128 neurons`: of one group."""
        found = _RANGE.search(self.groups[0].name)
        size = int(found[2]) - int(found[1]) if found and found[2] else 1
        return f"{size} {self.kind if size != 1 else self.kind.removesuffix('s')}"


def families_of(found: Facts) -> list[ExplainedFamily]:
    """In the order of their first parameters. Each parameter is drawn in the family that has most of it."""
    groups: dict[str, list[ExplainedGroup]] = {name: [] for name in found.families}
    most: dict[str, Counter[str]] = {}
    for group in found.groups:
        groups[group.family].append(group)
        for piece in group.slices:
            most.setdefault(piece.param, Counter())[group.family] += piece.stop - piece.start
    home = {param: sizes.most_common(1)[0][0] for param, sizes in most.items()}
    place = {row.param: i for i, row in reversed(list(enumerate(found.rows)))}
    families = []
    for name, own in groups.items():
        params = list(dict.fromkeys(piece.param for group in own for piece in group.slices))
        here = tuple(param for param in params if home[param] == name)
        if own:
            elsewhere = tuple(param for param in params if home[param] != name)
            families.append(ExplainedFamily(name, tuple(own), here, elsewhere))
    return sorted(families, key=lambda f: min(place.get(param, len(place)) for param in (*f.params, *f.elsewhere)))


def slice_text(piece: Slice) -> str:
    """As numpy would write it: `down.weight[:, 0:128]`."""
    return f"{piece.param}[{':, ' * piece.dim}{piece.start}:{piece.stop}]"


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
