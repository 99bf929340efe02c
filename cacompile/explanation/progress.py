"""How far something is that takes long: a line that stays up to date in a terminal or notebook, else the log."""

from __future__ import annotations

import logging
import sys
import threading
import time

log = logging.getLogger(__name__)

PATIENCE = 3.0
"""Seconds before anything is shown."""

EVERY = 0.5
"""Seconds between two looks at the clock."""


class Progress:
    """What is being done, since when; shown while in its context, if that takes more than a few seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._stage = ""
        self._began = time.perf_counter()
        self._done = threading.Event()
        self._live = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._thread = threading.Thread(target=self._show, name="cacompile progress", daemon=True)

    def __enter__(self) -> Progress:
        if self._live:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._live:
            self._thread.join()
        log.info("%s: done, %.1f s", self._what, time.perf_counter() - self._began)

    def stage(self, text: str) -> None:
        """Something else begins."""
        self._stage = text
        log.info("%s: %s, after %.1f s", self._what, text, time.perf_counter() - self._began)

    def _show(self) -> None:
        """Each line in the place of the one before; in the end nothing is left."""
        wait, line = PATIENCE, ""
        while not self._done.wait(wait):
            before, wait = len(line), EVERY
            line = f"{self._what}: {self._stage}, {time.perf_counter() - self._began:.0f} s"
            print(f"\r{line.ljust(before)}", end="", file=sys.stderr, flush=True)
        print(f"\r{' ' * len(line)}\r", end="", file=sys.stderr, flush=True)
