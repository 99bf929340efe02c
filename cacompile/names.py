"""Names of groups, made of parameter names: `layers.3.mlp.neurons[0:128]`. The same in every run and torch version."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

_PARAMETRIZED = re.compile(r"\.parametrizations\.\w+\.original\d*$")


@dataclass(frozen=True, slots=True)
class Named:
    """What groups are named after."""

    kind: str
    """In the plural: neurons, heads, filters, experts, tokens, outputs, rows."""
    makers: tuple[str, ...]
    """Weights that make them, as their rows."""
    weights: tuple[str, ...]
    """All weights that they are slices of, makers among them."""


def family_names(families: Sequence[Named]) -> list[str]:
    """A name for each family among all families of a model.

    Called after the innermost module that has all its weights and no other family of its kind, else after the module of
    the first weight that makes it: `layers.3.mlp.neurons`, `layer1.0.conv1.filters`.
    """
    owned = Counter(
        (family.kind, part) for family in families for part in {p for n in family.weights for p in prefixes(n)}
    )
    names = [_family_name(family, owned) for family in families]
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def group_name(family: str, start: int, stop: int) -> str:
    """Units `start:stop` of a family."""
    return f"{family}[{start}]" if stop == start + 1 else f"{family}[{start}:{stop}]"


def module_of(param: str) -> str:
    """The module of a parameter called `weight`, "" for the model itself; of any other parameter, its own name."""
    return _PARAMETRIZED.sub("", f".{param}").removesuffix(".weight").removeprefix(".")


def _family_name(family: Named, owned: Counter[tuple[str, str]]) -> str:
    first = module_of((family.makers or family.weights)[0])
    if family.kind != "filters":
        shared = [p for p in prefixes(first) if all(p in prefixes(module_of(name)) for name in family.weights)]
        if shared and owned[family.kind, shared[-1]] == 1:
            first = shared[-1]
    steps = first.split(".") if first else []
    return ".".join(steps if steps[-1:] == [family.kind] else [*steps, family.kind])


def fits(names: Iterable[str], pattern: str) -> bool:
    """Whether a pattern, or the very name, is one of these: names of groups have brackets, which patterns read."""
    return any(name == pattern or fnmatchcase(name, pattern) for name in names)


def find_params(pattern: str, names: Iterable[str]) -> list[str]:
    """The parameters that a pattern names, or that lie in a module which it names."""
    return [name for name in names if fits(prefixes(name), pattern)]


def prefixes(name: str) -> list[str]:
    """What something is a part of, and its own name: a, a.b, a.b.weight."""
    steps = name.split(".")
    return [".".join(steps[:n]) for n in range(1, len(steps) + 1)]
