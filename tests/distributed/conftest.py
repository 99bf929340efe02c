"""Two processes for all tests: to start them takes longer than most of what they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ranks import some_ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    with some_ranks() as run:
        yield run
