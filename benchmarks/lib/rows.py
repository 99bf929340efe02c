"""The CSV files of results: where they are, their columns, and how they are written."""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.lib.timing import Spread

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = ("date", "torch", "python", "device", "threads", "benchmark", "case", "arm", "measure",
           "unit", "median", "lower_quartile", "upper_quartile", "rounds")  # fmt: skip

Row = tuple[str, str, str, str, Spread]
"""(case, arm, measure, unit, spread)."""


def result_file(text: str) -> Path:
    """The type of an option: a file that rows are written to; known to be none before hours of measuring, not after."""
    if (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"must be a file, got the folder {text!r}")
    return path


def write_rows(file: Path, benchmark: str, rows: Iterable[Row], device: str | None = None) -> None:
    """Write rows with date and versions; replaces the file. device: by default the GPU, else this CPU."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if device is None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU"
    stamp = (datetime.date.today().isoformat(), torch.__version__, platform.python_version(), device)
    with open(file, "w", newline="") as out:
        lines = csv.writer(out, lineterminator="\n")
        lines.writerow(COLUMNS)
        for case, arm, measure, unit, spread in rows:
            figures = (f"{spread.median:.5g}", f"{spread.lower:.5g}", f"{spread.upper:.5g}", spread.rounds)
            lines.writerow((*stamp, torch.get_num_threads(), benchmark, case, arm, measure, unit, *figures))


def commit(root: Path = ROOT) -> str:
    """Of a checkout, short; empty where there is no git."""
    command = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
