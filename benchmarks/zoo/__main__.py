"""A zoo of models that others wrote: does each train, are its gradients right, what is masked, how slow is compiling?

    python -m benchmarks.zoo                                  # the whole zoo; goes on where it was interrupted
    python -m benchmarks.zoo --models llama resnet18 --fresh  # these again
    python -m benchmarks.zoo --self-check                     # a minute: one small model, to a temporary folder

Random weights, small sizes, one process on one thread a model. Transformers' models need transformers, timm's timm; a
model whose library is missing is a row without figures. `zoo.csv` has the rows, `zoo_notes.csv` what there is to say
about them and what they were measured with.

    trains         some optimizer steps, half of the groups off in a few: losses finite, the last below the first
    grads_equal    loss and gradients are Inductor's bit for bit, and within rounding where a mask is on; off is zero
    coverage       share of dW FLOPs that masked operations compute (counted)
    compile_ratio  first forward and backward with empty caches, convaware over Inductor (measured)
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from tabulate import tabulate

from benchmarks.lib.rows import RESULTS, ROOT
from benchmarks.zoo.models import ZOO
from benchmarks.zoo.run import ZooRow

COLUMNS = tuple(field.name for field in fields(ZooRow))
NOTES = ("model", "note", "date", "torch", "library", "cores")
SELF_CHECK = "mlp_chain"

Table = dict[str, dict[str, str]]
"""Model -> column -> text, as in the CSV file."""


class Goal(NamedTuple):
    """What a column should be; `of` names the models it is asked of."""

    column: str
    words: str
    least: float = -math.inf
    most: float = math.inf
    of: str = "all"

    def asks(self, model: str, source: str) -> bool:
        return self.of == "all" or source == "transformers" or model.startswith("resnet")

    def met(self, text: str) -> bool | None:
        """None where nothing was measured."""
        value = float({"": "nan", "True": "1", "False": "0"}.get(text, text))
        return None if math.isnan(value) else self.least <= value <= self.most


GOALS = (
    Goal("trains", "trains", least=1.0),
    Goal("grads_equal", "gradients equal", least=1.0),
    Goal("coverage", "coverage at least 95 %", least=0.95),
    Goal("semantic", "semantic at least 90 %", least=0.9, of="transformers and ResNets"),
    Goal("compile_ratio", "compile ratio at most 1.10", most=1.10),
)


def run(model: str, rounds: int, limit: float) -> tuple[dict[str, str], str]:
    """(row, note) of one model, measured in a child; what the child did not live to measure stays empty."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(folder) / "cache"))
        command = [sys.executable, "-m", "benchmarks.zoo.run", model, str(rounds), str(file)]
        found = {"row": asdict(ZooRow(model, ZOO[model][0])), "notes": []}
        died = ""
        try:
            child = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=limit)
            if child.returncode:
                died = f"exit code {child.returncode}: {(child.stderr.strip().splitlines() or [''])[-1][:200]}"
        except subprocess.TimeoutExpired:
            died = f"stopped after {limit:.0f} s"
        if file.exists():
            found = json.loads(file.read_text())
    row = {column: _text(found["row"][column]) for column in COLUMNS}
    if died.startswith("exit"):  # of what ran out of time nothing is known
        row["trains"] = row["trains"] or "False"
    return row, "; ".join([*found["notes"], *filter(None, [died])])


def _text(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def stamp(model: str, note: str) -> dict[str, str]:
    """A row of the notes: the note, and what the model was measured with."""
    source = ZOO[model][0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    library = f"{source} {_version(source)}" if source != "here" else ""
    values = (model, note, datetime.date.today().isoformat(), _version("torch"), library, str(cores))
    return dict(zip(NOTES, values))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def read(file: Path) -> Table:
    if not file.exists():
        return {}
    with open(file, newline="") as lines:
        return {row["model"]: row for row in csv.DictReader(lines)}


def write(file: Path, columns: Sequence[str], table: Table) -> None:
    """All rows, in the zoo's order."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="") as out:
        lines = csv.DictWriter(out, columns, lineterminator="\n", extrasaction="ignore")
        lines.writeheader()
        lines.writerows(table[model] for model in ZOO if model in table)


def measure(models: Iterable[str], out: Path, rounds: int, limit: float, fresh: bool) -> tuple[Table, Table]:
    """Rows and notes; what is in the files already is kept, unless `fresh` or without figures."""
    rows, notes = read(out / "zoo.csv"), read(out / "zoo_notes.csv")
    for model in models:
        if not fresh and rows.get(model, {}).get("trains"):
            continue
        rows[model], note = run(model, rounds, limit)
        notes[model] = stamp(model, note)
        write(out / "zoo.csv", COLUMNS, rows)
        write(out / "zoo_notes.csv", NOTES, notes)
        print(f"{model}: {', '.join(f'{c} {rows[model][c] or None}' for c in COLUMNS[2:])}", flush=True)
    return rows, notes


def missed(rows: Iterable[dict[str, str]]) -> Iterator[str]:
    """A line for each goal that some model misses, or that was not measured."""
    measured = [row for row in rows if row["trains"]]
    for goal in GOALS:
        met = {r["model"]: goal.met(r[goal.column]) for r in measured if goal.asks(r["model"], r["source"])}
        failed = [model for model, good in met.items() if good is False]
        unknown = [model for model, good in met.items() if good is None]
        asked = f"{goal.words}{'' if goal.of == 'all' else f' ({goal.of})'}"
        if failed:
            yield f"missed: {asked}: {', '.join(failed)}"
        if unknown:
            yield f"not measured: {asked}: {', '.join(unknown) if len(unknown) < len(met) else 'all'}"
    if none := [row["model"] for row in rows if not row["trains"]]:
        yield f"without figures: {', '.join(none)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(ZOO), default=list(ZOO), metavar="MODEL")
    parser.add_argument("--rounds", type=int, default=1, help="pairs of cold compiles a model, 0 for none")
    parser.add_argument("--out", type=Path, help="folder of zoo.csv and zoo_notes.csv")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds a model may take")
    parser.add_argument("--fresh", action="store_true", help="measure again what has figures already")
    parser.add_argument("--self-check", action="store_true", help="one small model, to a temporary folder")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        if args.self_check:
            args.models, args.out = [SELF_CHECK], args.out or Path(scratch)
        rows, notes = measure(args.models, args.out or RESULTS, args.rounds, args.limit, args.fresh)
    chosen = [rows[model] for model in args.models]
    print(tabulate([list(row.values()) for row in chosen], headers=COLUMNS))
    for model in args.models:
        if model in notes and notes[model]["note"]:
            print(f"{model}: {notes[model]['note']}")
    print("\n".join(missed(chosen)) or "all goals met")
    # goals are for people to read; only the check of the benchmark itself decides the exit status
    return int(args.self_check and chosen[0]["trains"] != "True")


if __name__ == "__main__":
    sys.exit(main())
