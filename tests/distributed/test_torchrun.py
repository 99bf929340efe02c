"""`torchrun` with two processes: training loops of other libraries, processes that end, and slow ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripts import run_module

LOOPS, ELASTIC = (Path(__file__).with_name(name) for name in ("loops.py", "elastic.py"))


def torchrun(script: Path, *arguments: str, restarts: int = 0) -> str:
    # with the launcher's store gloo would meet those of the attempt before
    new_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **new_store, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    options = ["--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    return run_module("torch.distributed.run", *options, str(script), *arguments, environment=environment)


def assert_as_it_would_have(found: dict[str, Any]) -> None:
    assert found["ranks"] == 2 and found["steps"] == 10
    assert found["apart"] == found["resumed"] == 0.0 and found["masks"]
    assert found["skipped"] > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("which", ["trainer", "accelerate", "lightning"])
def test_loops_of_others_go_on_as_they_would_have(which: str, tmp_path: Path) -> None:
    torchrun(LOOPS, which, str(tmp_path))
    for rank in range(2):
        assert_as_it_would_have(json.loads((tmp_path / f"found-{rank}.json").read_text()))


def accelerated(rank: int, folder: str) -> dict[str, Any]:
    """As under `torchrun`, which says by these variables who a process is."""
    from loops import compare

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
            patch.setenv(name, str(value))
        return compare("accelerate", Path(folder))


def test_accelerate_goes_on_as_it_would_have(ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    for found in ranks(accelerated, str(tmp_path)):
        assert_as_it_would_have(found)


def elastic(folder: Path, ends: int, slow: int = -1) -> list[dict[str, Any]]:
    folder.mkdir()
    torchrun(ELASTIC, str(folder), str(ends), str(slow), restarts=1)
    first, second = (json.loads((folder / f"found-{rank}.json").read_text()) for rank in range(2))
    assert first["masks"] == second["masks"] and first["weights"] == second["weights"]
    return [first, second]


@pytest.mark.slow
def test_a_rank_that_is_killed_or_slow_changes_nothing(tmp_path: Path) -> None:
    """Neither the one that decides nor the other leaves anybody waiting, and restarts go on as it would have."""
    whole, _ = elastic(tmp_path / "whole", -1)
    assert whole["attempt"] == whole["start"] == 0
    assert sum(not on for mask in whole["masks"] for on in mask) > 5
    slow, _ = elastic(tmp_path / "slow", -1, slow=1)
    assert slow == whole
    for rank in range(2):
        again, _ = elastic(tmp_path / f"killed {rank}", rank)
        assert (again["attempt"], again["start"]) == (1, 10)
        assert again["weights"] == whole["weights"] and again["masks"] == whole["masks"][10:]
