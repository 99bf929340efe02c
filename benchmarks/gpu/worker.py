"""Work in processes of their own: a crash, a hang or a poisoned CUDA context costs one figure and not the run."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

SPAWN = multiprocessing.get_context("spawn")
_STARTING = threading.Lock()
"""The environment is this process's, and several threads start others."""


class Failure(RuntimeError):
    """What went wrong in another process, in one line."""


class WrongResult(Failure):
    """An assertion that failed: the process itself is well."""


class Process:
    """A spawned process that runs `target(pipe, *args)`; `environment` is set before it imports anything."""

    def __init__(self, target: Callable[..., None], *args: Any, environment: Mapping[str, str] | None = None) -> None:
        self.pipe, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_masked, args=(target, theirs, *args), daemon=True)
        with _STARTING:
            before = dict(os.environ)
            os.environ.update(environment or {})
            try:
                self._process.start()
            finally:
                os.environ.clear()
                os.environ.update(before)
        theirs.close()

    def receive(self, timeout: float) -> Any:
        """The next message; Failure when it is an error, or none comes in `timeout` seconds."""
        if not self.pipe.poll(max(timeout, 0.0)):
            raise Failure(f"no answer within {timeout:.0f} s")
        try:
            message = self.pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join(5.0)
            raise Failure(f"its process ended with exit code {self._process.exitcode}") from None
        if isinstance(message, Failure):
            raise message
        return message

    def send(self, message: Any) -> None:
        try:
            self.pipe.send(message)
        except (BrokenPipeError, ConnectionError):
            self._process.join(5.0)
            raise Failure(f"its process ended with exit code {self._process.exitcode}") from None

    def stop(self) -> None:
        self.pipe.close()
        self._process.join(0.0)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(10.0)


def _masked(target: Callable[..., None], pipe: Connection, *args: Any) -> None:
    try:
        target(pipe, *args)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        pass  # whoever asked is gone
    except BaseException as error:
        traceback.print_exc()
        pipe.send(one_line(error))


def one_line(error: BaseException) -> Failure:
    text = " ".join(str(error).split())
    return Failure(f"{type(error).__name__}: {text[:300]}")


class Worker:
    """Calls functions in another process, one after another; a new process after a failure."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = environment
        self._process: Process | None = None

    def call(self, function: Callable[..., Any], *args: Any, timeout: float) -> Any:
        """`function(*args)`; Failure for whatever goes wrong, after `timeout` seconds at the latest."""
        end = time.monotonic() + timeout
        self._process = process = self._process or Process(_serve, environment=self._environment)
        try:
            process.send((function, args))
            return process.receive(end - time.monotonic())
        except WrongResult:
            raise
        except Failure:
            self.stop()  # after an illegal access nothing more would run in that process
            raise

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None


def _serve(pipe: Connection) -> None:
    while True:
        function, args = pipe.recv()
        try:
            pipe.send(function(*args))
        except AssertionError as error:
            pipe.send(WrongResult(str(one_line(error))))
