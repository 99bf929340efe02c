"""Every test starts with a fresh Dynamo and its own random numbers."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole scripts first: of two processes, neither should be left with the slowest at the end."""
    items.sort(key=lambda item: item.path.name != "test_scripts.py")
