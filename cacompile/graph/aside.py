"""Versions that are compiled in a thread of their own, while the dense one serves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Hashable

log = logging.getLogger(__name__)


class Aside:
    """Runs jobs in threads that the end of the program waits for; of those of one key, one at a time."""

    def __init__(self) -> None:
        self._started: dict[Hashable, threading.Thread] = {}

    def start(self, key: Hashable, job: Callable[[], object]) -> None:
        """Start it, unless it runs. job: raises nothing that anybody waits for; one that does is not started again."""
        if key not in self._started:
            thread = threading.Thread(target=self._run, args=(key, job), name="convaware compile")
            self._started[key] = thread
            thread.start()

    def _run(self, key: Hashable, job: Callable[[], object]) -> None:
        try:
            job()
        except Exception:
            log.warning("a version of a backward could not be compiled aside", exc_info=True)
        else:
            del self._started[key]
