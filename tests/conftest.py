"""Every test starts with a fresh Dynamo and its own random numbers."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from helpers import interpreted  # noqa: F401 - a fixture
from interpreter import interpreter_process, skip_without_interpreter
from param_states import backward, followed, make, rows  # noqa: F401 - fixtures, for every folder below
from thinning import thin_out
from torch._functorch import config as functorch_config

from cacompile.controller import policy


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    # on a hit no pass runs, and what a test puts in the place of a part of ours would not either
    with functorch_config.patch(enable_autograd_cache=False):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=["interpreter", *(["cuda"] if torch.cuda.is_available() else [])])
def launch(request: pytest.FixtureRequest) -> Iterator[Callable[..., None]]:
    """Runs a function of a test file where kernels run, with the device as its first argument."""
    if request.param == "cuda":
        yield lambda function, *args: function("cuda", *args)
        return
    skip_without_interpreter()
    with interpreter_process() as run:
        yield lambda function, *args: run(function, "cpu", *args)


LONGEST = (
    *("test_exact.py", "test_triton_compile.py", "test_truncated.py", "test_triton_matmul.py", "test_cached_start.py"),
    *("test_fully_sharded.py", "test_survive.py", "test_never_apart.py", "test_session.py", "test_random_models.py"),
)


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: of two processes, neither should be left with the slowest at the end."""
    thin_out(items)
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture
def however_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are skipped however fast they move, so that few steps at high rates suffice."""
    monkeypatch.setattr(policy, "FAST", np.inf)
