"""Versions that were made later, found again by this or the next process: in Inductor's cache, under keys of ours."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from cacompile.torch_internals import config_digest, find_code, save_code, storable

from .facts import VersionFacts

log = logging.getLogger(__name__)

_FACTS = "convaware"
"""Attribute of the code that holds its VersionFacts."""


@dataclass(frozen=True, slots=True)
class VersionCache:
    """Of one backward."""

    base: str
    """A hash of all that its versions are made of."""
    patched: Callable[[], AbstractContextManager[Any]]
    """Inductor's configuration as the versions are compiled under."""

    def find(self, name: str, settings: Mapping[str, Any]) -> tuple[Any, VersionFacts] | None:
        """A version's code and facts; None where it has to be compiled. Never raises."""
        try:
            with self.patched():
                code = find_code(self._key(name), settings)
            return None if code is None else (code, getattr(code, _FACTS))
        except Exception:
            log.debug("a cached version of a backward could not be loaded", exc_info=True)
            return None

    def save(self, name: str, code: Any, facts: VersionFacts) -> bool:
        """Returns whether torch has raised nothing. Never raises: what cannot be saved is compiled again later."""
        try:
            with self.patched():
                stored = storable(code)
                setattr(stored, _FACTS, facts)
                save_code(self._key(name), stored)
            return True
        except Exception:
            log.debug("a version of a backward could not be saved", exc_info=True)
            return False

    def _key(self, name: str) -> str:
        return "f" + digest([self.base, config_digest(), name])


def digest(parts: Iterable[Any]) -> str:
    """A hash of what these look like."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()
