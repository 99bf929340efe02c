"""`torchrun` with two processes: training loops of other libraries, processes that end, and slow ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from scripts import run_module

LOOPS = Path(__file__).with_name("loops.py")


def torchrun(script: Path, *arguments: str, restarts: int = 0) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    options = ["--standalone", "--nproc_per_node=2", f"--max-restarts={restarts}"]
    return run_module("torch.distributed.run", *options, str(script), *arguments, environment=environment)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["trainer", "accelerate", "lightning"])
def test_loops_of_others_go_on_as_they_would_have(which: str, tmp_path: Path) -> None:
    torchrun(LOOPS, which, str(tmp_path))
    for rank in range(2):
        found = json.loads((tmp_path / f"found-{rank}.json").read_text())
        assert found["ranks"] == 2 and found["steps"] == 10
        assert found["apart"] == found["resumed"] == 0.0 and found["masks"]
        assert found["skipped"] > 0.05
