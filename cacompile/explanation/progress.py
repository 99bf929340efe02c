"""How far something is that takes long: a line that stays up to date in a terminal or notebook, else the log."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Iterator

log = logging.getLogger(__name__)

PATIENCE = 3.0
"""Seconds before anything is shown."""

EVERY = 0.5
"""Seconds between two looks at the clock."""


class Progress:
    """What is being done, since when."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._stage = ""
        self._began = time.perf_counter()
        self._done = threading.Event()
        self._live = sys.stderr.isatty() or "ipykernel" in sys.modules
        self._width = 0
        self._thread = threading.Thread(target=self._show, name="cacompile progress", daemon=True)

    def stage(self, text: str) -> None:
        """Something else begins."""
        self._stage = text
        log.info("%s: %s, after %.1f s", self._what, text, time.perf_counter() - self._began)

    def _show(self) -> None:
        wait = PATIENCE
        while not self._done.wait(wait):
            self._write(f"{self._what}: {self._stage}, {time.perf_counter() - self._began:.0f} s")
            wait = EVERY
        self._write("")

    def _write(self, line: str) -> None:
        """In the place of the line before."""
        sys.stderr.write(f"\r{line.ljust(self._width)}" if line else f"\r{' ' * self._width}\r")
        sys.stderr.flush()
        self._width = len(line)


@contextlib.contextmanager
def progress(what: str) -> Iterator[Progress]:
    """Show how far it is while in the context, if that takes more than a few seconds."""
    shown = Progress(what)
    if shown._live:
        shown._thread.start()
    try:
        yield shown
    finally:
        shown._done.set()
        if shown._live:
            shown._thread.join()
        log.info("%s: done, %.1f s", what, time.perf_counter() - shown._began)
