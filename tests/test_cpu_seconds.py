"""Seconds of the processor are those of children too, and waiting is none."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from cpu_seconds import spent

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs Linux's /proc")


def test_children_count() -> None:
    before, works = spent(os.getpid()), "import time\nwhile time.process_time() < 0.4: pass"
    subprocess.run([sys.executable, "-c", works], check=True)
    assert spent(os.getpid()) - before >= 0.35


def test_waiting_does_not() -> None:
    before, own = spent(os.getpid()), time.process_time()
    time.sleep(0.5)
    assert spent(os.getpid()) - before < 0.25 + time.process_time() - own
