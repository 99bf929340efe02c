"""Names of torch's, looked up by their contracts, and which of these do not hold on the torch that is there."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .contracts import CONTRACTS, Contract

_by_name = {contract.name: contract for contract in CONTRACTS}
_forced: set[str] = set()


def resolve(name: str) -> Any:
    """The object behind a contract's name. Raises AttributeError for a name without contract, or that has moved."""
    if name not in _by_name:
        raise AttributeError(f"module 'cacompile.torch_internals' has no attribute {name!r}")
    return _by_name[name].resolve()


def imported(name: str) -> Any:
    """The module behind a contract's name, if anybody has imported it; else None."""
    places = _by_name[name].place.split(" | ")
    return next((module for place in places if (module := sys.modules.get(place)) is not None), None)


@dataclass(frozen=True)
class Broken:
    """A contract that does not hold on the torch that is there."""

    contract: Contract
    fault: str

    def __str__(self) -> str:
        return f"{self.contract.name} ({self.contract.place}): {self.fault}"


def broken_contracts(purpose: str | None = None) -> list[Broken]:
    """The contracts that do not hold here, of one purpose or of all."""
    return list(_broken(purpose, frozenset(_forced)))


@functools.cache  # asked for every graph; torch does not change while a process runs
def _broken(purpose: str | None, forced: frozenset[str]) -> tuple[Broken, ...]:
    wanted = [contract for contract in CONTRACTS if purpose in (None, contract.purpose)]
    faults = ("was taken away for a test" if each.name in forced else each.fault() for each in wanted)
    return tuple(Broken(contract, fault) for contract, fault in zip(wanted, faults) if fault is not None)


@contextlib.contextmanager
def taken_away(name: str) -> Iterator[None]:
    """Let one contract not hold, for a test of what happens then."""
    _forced.add(_by_name[name].name)
    try:
        yield
    finally:
        _forced.discard(name)


def release() -> str:
    """The release of torch that is there, such as "2.13"."""
    return ".".join(torch.__version__.split("+")[0].split(".")[:2])
