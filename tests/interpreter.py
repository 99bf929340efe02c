"""Where Triton's interpreter runs: it must be switched on before triton is imported and stays on, so in a process."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import pytest


def skip_without_interpreter() -> None:
    pytest.importorskip("triton", exc_type=ImportError)
    try:
        old = version("triton").startswith("3.6")
    except PackageNotFoundError:  # a build of another name
        return
    if old and int(version("numpy").split(".")[1]) >= 4:
        pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4", allow_module_level=True)


@contextmanager
def interpreter_process(prepare: Callable[[], None] | None = None) -> Iterator[Callable[..., Any]]:
    """Runs functions of test files where triton interprets; what they return or raise comes back."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), prepare) as pool:
        with pytest.MonkeyPatch.context() as patch:  # for that process alone, which starts with its first task
            patch.setenv("TRITON_INTERPRET", "1")
            pool.submit(os.getpid).result()
        yield lambda function, *args: pool.submit(function, *args).result()
