"""What the tests of ranks share: processes that come up again after one of them has failed."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import pytest
from torch import distributed as dist


def crash(rank: int) -> None:
    """The first waits for a second that is gone."""
    if rank:
        os._exit(1)
    dist.barrier()


def fail(rank: int) -> None:
    if rank:
        raise LookupError("one of two")
    dist.barrier()


def together(rank: int) -> int:
    dist.barrier()
    return rank


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "error"), [(crash, (BrokenProcessPool, RuntimeError)), (fail, LookupError)])
def test_ranks_come_up_again(
    ranks: Callable[..., list[Any]], ending: Callable[[int], None], error: type[Exception] | tuple[type[Exception], ...]
) -> None:
    with pytest.raises(error):
        ranks(ending)
    assert ranks(together) == [0, 1]
