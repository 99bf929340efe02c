"""Runs examples and benchmarks as a user would call them, and reads what they write."""

import csv
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_script(script: str, *arguments: str) -> str:
    """What `python script` prints; fails with its last words. script: from the project's folder."""
    return _run(str(ROOT / script), *arguments)


def run_module(module: str, *arguments: str, timeout: int = 600, environment: Mapping[str, str] | None = None) -> str:
    """What `python -m module` prints, in the project's folder; fails with its last words."""
    return _run("-m", module, *arguments, timeout=timeout, environment=environment)


def _run(*command: str, timeout: int = 600, environment: Mapping[str, str] | None = None) -> str:
    result = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=environment
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def read_rows(file: Path) -> list[dict[str, str]]:
    with open(file, newline="") as lines:
        return list(csv.DictReader(lines))
