"""What `benchmarks.quality` writes and reads again: a CSV row for each run, and what convaware skipped step by step."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

import cacompile
from benchmarks.lib.rows import ROOT

if TYPE_CHECKING:
    import pandas as pd  # who only writes, as on a GPU's machine, does without

COLUMNS = (
    "task", "arm", "seed", "split", "steps", "steps_taken", "cost_flops", "cost_seconds", "quality", "accuracy",
    "skipped_share", "beside", "options", "date", "torch", "cacompile", "python", "device", "threads",
)  # fmt: skip

LOOK_COLUMNS = ("task", "arm", "seed", "split", "steps", "step", "cost_flops", "cost_seconds", "quality")
"""Of what is measured along the way."""


class Key(NamedTuple):
    """What makes a run the same run."""

    task: str
    arm: str
    seed: int
    split: str
    steps: int


def stamp() -> dict[str, Any]:
    """When and with what a run is made."""
    return {
        "date": datetime.date.today().isoformat(), "torch": torch.__version__, "cacompile": _version(),
        "python": platform.python_version(), "device": platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _version() -> str:
    """With the commit where there is one, and "dirty" if the package differs from it."""
    commit = _git("rev-parse", "--short", "HEAD")
    dirty = ".dirty" if _git("status", "--porcelain", "cacompile", "passes") else ""
    return f"{cacompile.__version__}+{commit}{dirty}" if commit else cacompile.__version__


def _git(*command: str) -> str:
    try:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, timeout=10).stdout.strip()
    except OSError:
        return ""


def read(file: Path) -> pd.DataFrame:
    """All rows; of a run that was made twice the later."""
    import pandas as pd

    if not file.exists():
        return pd.DataFrame(columns=list(COLUMNS))
    rows = pd.read_csv(file, keep_default_na=False, na_values={"skipped_share": [""]})
    if tuple(rows.columns) != COLUMNS:
        raise ValueError(f"{file} has columns {', '.join(rows.columns)}; expected {', '.join(COLUMNS)}")
    return rows.drop_duplicates(list(Key._fields), keep="last", ignore_index=True)


def keys(rows: pd.DataFrame) -> set[Key]:
    """The runs that are done."""
    return {Key(*values) for values in rows[list(Key._fields)].itertuples(index=False)}


def read_looks(file: Path) -> pd.DataFrame:
    """What was measured along the way; of a run that was made twice the later."""
    import pandas as pd

    if not file.exists():
        return pd.DataFrame(columns=list(LOOK_COLUMNS))
    return pd.read_csv(file).drop_duplicates([*Key._fields, "step"], keep="last", ignore_index=True)


def append(file: Path, row: dict[str, Any], columns: Sequence[str] = COLUMNS) -> None:
    """Write one row at once, so that no later crash loses it."""
    new = not file.exists()
    with open(file, "a", newline="") as out:
        lines = csv.DictWriter(out, columns, lineterminator="\n")
        if new:
            lines.writeheader()
        lines.writerow({name: f"{v:.7g}" if isinstance(v, float) else v for name, v in row.items()})


def profile_file(out: Path, task: str, steps: int, seed: int) -> Path:
    return out / "quality_profiles" / f"{task}-{steps}-{seed}.csv"


def write_profile(file: Path, shares: Sequence[float]) -> None:
    """Share of the dW FLOPs that were skipped, a line for each step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(["skipped_share\n", *(f"{share:.5g}\n" for share in shares)]))


def read_profile(file: Path) -> list[float]:
    import pandas as pd

    return pd.read_csv(file)["skipped_share"].tolist()
