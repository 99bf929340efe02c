"""Families of groups as people are told of them."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from cacompile.passes.plan import Slice

from .facts import ExplainedGroup, Facts

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
