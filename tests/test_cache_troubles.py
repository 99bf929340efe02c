"""Processes that share a cache, or whose cache is in trouble: at worst they compile, and they train the same."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cacompile import torch_internals

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(torch_internals.broken_contracts(torch_internals.CACHE)), reason="this torch cannot: `doctor` says why"
    ),
]

STEPS = 4
"""Lines that a process of the fleet prints before its counts."""

HIT = "hits 1, misses 0, compiled 0"


def begin(cache: Path, *args: str, within: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """A process of the fleet that has its cache there. within: a command that runs it."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"}
    environment["TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS"] = "0"
    command = [*within, sys.executable, str(Path(__file__).with_name("fleet.py")), *(args or ("train",))]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[list[str], str]:
    """Its weights after each step, and what it counts."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    *weights, counted = out.splitlines()
    assert len(weights) == STEPS
    return weights, counted


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The weights, of a process that has a cache of its own."""
    weights, counted = end(begin(tmp_path_factory.mktemp("cache")))
    assert counted.startswith("hits 0, misses 1, compiled ") and not counted.endswith(" 0")
    return weights


def test_a_fleet(tmp_path: Path) -> None:
    """One process fills the cache, its artifacts are carried to a machine that has none: nothing is compiled there."""
    artifacts = str(tmp_path / "artifacts")
    cold, _ = end(begin(tmp_path / "first", "fill", artifacts))
    shutil.rmtree(tmp_path / "first")
    assert end(begin(tmp_path / "second", "use", artifacts)) == (cold, HIT)


def test_two_at_once_on_an_empty_cache(tmp_path: Path, expected: list[str]) -> None:
    both = [begin(tmp_path / "cache") for _ in range(2)]
    assert [end(each)[0] for each in both] == [expected] * 2
    assert end(begin(tmp_path / "cache")) == (expected, HIT)


@pytest.mark.parametrize("after", ["first file", "first step"])
def test_one_that_is_killed(after: str, tmp_path: Path, expected: list[str]) -> None:
    """In the middle of compiling, and when it has an entry but not all versions."""
    cache = tmp_path / "cache"
    first = begin(cache)
    if after == "first step":
        assert first.stdout is not None and first.stdout.readline().strip() == expected[0]
    else:
        while not any(path.is_file() for path in cache.rglob("*")):
            assert first.poll() is None
            time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    assert end(begin(cache))[0] == expected
    assert end(begin(cache)) == (expected, HIT)


TINY = """
for kind in aotautograd fxgraph
do mkdir -p "$0/$kind" && mount -t tmpfs -o size=16k none "$0/$kind" || exit 1
done
exec "$@"
"""


def test_a_disk_that_is_full_indeed(tmp_path: Path, expected: list[str]) -> None:
    """Entries have a disk of 16 KiB each: code for the compiler's own files is elsewhere, else nothing compiles."""
    cache = tmp_path / "cache"
    within = ("unshare", "--map-root-user", "--mount", "sh", "-c", TINY, str(cache))
    try:
        subprocess.run([*within, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no disk can be made here: {error}")
    weights, counted = end(begin(cache, within=within))
    assert weights == expected and counted.startswith("hits 0, misses 1")
    assert end(begin(cache))[0] == expected, "its disks are gone with it"
