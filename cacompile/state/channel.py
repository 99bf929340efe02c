"""A channel between the ranks that agree: one decides, all tell it what they know, and all read what it says.

It lies in the process group's store. Nothing but `decision` ever waits, and only for a rank that is known to be there.
"""

from __future__ import annotations

import pickle
import time
from typing import Any

from torch import distributed as dist

from cacompile.errors import ConvAwareError

PIECE = 2**22
"""Most bytes under one key: stores take messages up to some size."""

PATIENCE = 10.0
"""Seconds to wait for what other ranks are about to tell, where a state is saved."""


class Channel:
    """Messages about one agreement under keys of its own: plain values and arrays, so that any version reads them."""

    def __init__(self, store: dist.Store, name: str, rank: int, size: int) -> None:
        self._store, self._name, self.rank, self.size = store, name, rank, size
        self._decided: list[tuple[int, list[str]]] = []
        self._told: dict[str, Any] | None = None

    def greet(self, hello: dict[str, Any]) -> None:
        """The deciding rank is there."""
        self._set("hello", hello)

    def hello(self) -> dict[str, Any] | None:
        """What it said then; None if it has not yet."""
        return self._get("hello") if self._store.check([f"{self._name}/hello"]) else None

    def tell(self, known: dict[str, Any]) -> None:
        """What this rank knows now, with its `clock`: optimizer steps done."""
        self._set(f"known/{self.rank}", {"now": known, "before": self._told})
        self._told = known

    def told(self, clock: int) -> list[dict[str, Any]] | None:
        """What each other rank has told last before its optimizer step `clock`; None while one has told nothing.

        One that is a step ahead by now, by chance, may have told more since, which is not looked at.
        """
        keys = [f"{self._name}/known/{rank}" for rank in range(self.size) if rank != self.rank]
        if not self._store.check(keys):
            return None
        many = self._store.multi_get(keys) if self._store.has_extended_api() else map(self._store.get, keys)
        told = [self._whole(key, first) for key, first in zip(keys, many)]
        found = [each["now"] if each["now"]["clock"] < clock else each["before"] for each in told]
        return None if None in found else found

    def told_at(self, clock: int) -> list[dict[str, Any]] | None:
        """What each other rank tells after its step `clock`, which it is about to end; None if one does not."""
        until = time.monotonic() + PATIENCE
        while (told := self.told(clock + 1)) is not None and time.monotonic() < until:
            if all(known["clock"] == clock for known in told):
                return told
            time.sleep(0.01)
        return None

    def decide(self, epoch: int, clock: int, decision: dict[str, Any]) -> None:
        self._decided.append((clock, self._set(f"decided/{epoch}/{clock}", decision)))

    def decision(self, epoch: int, clock: int) -> dict[str, Any]:
        """What has been decided on a reading. Raises ConvAwareError if nothing is, as long as the group waits."""
        try:
            return self._get(f"decided/{epoch}/{clock}")
        except dist.DistStoreError as error:
            raise ConvAwareError(
                f"rank 0 has decided nothing after optimizer step {clock}, which rank {self.rank} has done: optimizers "
                "of parameters under DistributedDataParallel must step equally often on all ranks"
            ) from error

    def clear(self, before: int) -> None:
        """Drop the decisions that all ranks have taken over."""
        for clock, keys in self._decided:
            if clock < before:
                for key in keys:
                    self._store.delete_key(key)
        self._decided = [each for each in self._decided if each[0] >= before]

    def leave(self, epoch: int, state: dict[str, Any]) -> None:
        """The state with which the last ranks end a `Join`, the same on each of them."""
        self._set(f"joined/{epoch}", state)

    def joined(self, epoch: int) -> dict[str, Any]:
        return self._get(f"joined/{epoch}")

    def _set(self, key: str, value: dict[str, Any]) -> list[str]:
        key, data = f"{self._name}/{key}", pickle.dumps(value)
        rest = [data[start : start + PIECE] for start in range(PIECE, len(data), PIECE)]
        keys = [f"{key}+{i}" for i in range(len(rest))]
        for more, piece in zip(keys, rest):
            self._store.set(more, piece)
        self._store.set(key, len(rest).to_bytes(4, "big") + data[:PIECE])  # last: who sees it sees all
        return [key, *keys]

    def _get(self, key: str) -> dict[str, Any]:
        key = f"{self._name}/{key}"
        return self._whole(key, self._store.get(key))

    def _whole(self, key: str, first: bytes) -> dict[str, Any]:
        rest = [self._store.get(f"{key}+{i}") for i in range(int.from_bytes(first[:4], "big"))]
        return pickle.loads(b"".join([first[4:], *rest]))
