"""The rows of a run, in the benchmarks' one CSV schema, written as they are measured: a killed run keeps them."""

from __future__ import annotations

import csv
import datetime
import platform
from pathlib import Path

import torch

from benchmarks.lib.rows import COLUMNS, commit
from benchmarks.lib.timing import Spread

NOTES = ("failed", "not run")
"""Measures without a figure; the unit says why."""


class Rows:
    """One CSV file, row by row; `resume` keeps the cases that were finished on the same day with the same torch."""

    def __init__(self, file: Path, device: str, *, resume: bool) -> None:
        self.stamp = {
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": device,
            "threads": str(torch.get_num_threads()),
        }
        self.rows = self._kept(file) if resume and file.exists() else []
        self._file = file
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(",".join(COLUMNS) + "\n")
        self._append(self.rows)

    def _append(self, rows: list[dict[str, str]]) -> None:
        with open(self._file, "a", newline="") as out:
            csv.DictWriter(out, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n").writerows(rows)

    def _kept(self, file: Path) -> list[dict[str, str]]:
        same = {name: self.stamp[name] for name in ("date", "commit", "torch", "device") if name in COLUMNS}
        with open(file, newline="") as lines:
            rows = list(csv.DictReader(lines))
        unfinished = {(row["benchmark"], row["case"]) for row in rows if row["measure"] in NOTES}
        kept = [row for row in rows if all(row.get(name) == value for name, value in same.items())]
        return [row for row in kept if (row["benchmark"], row["case"]) not in unfinished]

    def has(self, benchmark: str, case: str, arm: str | None = None) -> bool:
        mine = (row["arm"] for row in self.rows if (row["benchmark"], row["case"]) == (benchmark, case))
        return any(arm in (None, each) for each in mine)

    def add(self, benchmark: str, case: str, arm: str, measure: str, unit: str, spread: Spread) -> None:
        figures = {
            "median": f"{spread.median:.5g}",
            "lower_quartile": f"{spread.lower:.5g}",
            "upper_quartile": f"{spread.upper:.5g}",
            "rounds": str(spread.rounds),
        }
        self._write({"benchmark": benchmark, "case": case, "arm": arm, "measure": measure, "unit": unit, **figures})

    def note(self, benchmark: str, case: str, arm: str, what: str, why: str) -> None:
        """what: one of NOTES."""
        self._write({"benchmark": benchmark, "case": case, "arm": arm, "measure": what, "unit": why})
        print(f"  {what}: {case} {arm}: {why}", flush=True)

    def _write(self, values: dict[str, str]) -> None:
        row = {**self.stamp, **values}
        self.rows.append(row)
        self._append([row])

    def find(self, benchmark: str, measure: str, unit: str) -> dict[tuple[str, str], Spread]:
        """(case, arm) -> figure, in the order of measurement."""
        wanted = (benchmark, measure, unit)
        return {
            (row["case"], row["arm"]): Spread(
                float(row["median"]), float(row["lower_quartile"]), float(row["upper_quartile"]), int(row["rounds"])
            )
            for row in self.rows
            if (row["benchmark"], row["measure"], row["unit"]) == wanted
        }

    def notes(self, benchmark: str) -> list[tuple[str, str, str, str]]:
        """(what, case, arm, why)."""
        return [
            (row["measure"], row["case"], row["arm"], row["unit"])
            for row in self.rows
            if row["benchmark"] == benchmark and row["measure"] in NOTES
        ]
