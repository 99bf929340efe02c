"""The zoo's benchmark: one model through all of it, and what it makes of missing libraries and of earlier rows."""

import os
from pathlib import Path

import pytest
from scripts import read_rows, run_module

HEADER = "model,source,trains,grads_equal,coverage,semantic,graph_breaks,analysis_s,nodes,compile_ratio"


def run(*arguments: str, path: Path | None = None) -> str:
    paths = filter(None, (path and str(path), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    return run_module("benchmarks.zoo", *arguments, environment=environment)


@pytest.mark.slow
def test_checks_itself(tmp_path):
    run("--self-check", "--out", str(tmp_path))
    [row] = read_rows(tmp_path / "zoo.csv")
    assert list(row) == HEADER.split(",")
    assert row["trains"] == row["grads_equal"] == "True"
    assert (float(row["coverage"]), row["graph_breaks"]) == (pytest.approx(1.0), "0")
    assert float(row["compile_ratio"]) > 0.0
    [note] = read_rows(tmp_path / "zoo_notes.csv")
    assert "never skipped" not in note["note"]


@pytest.mark.slow
def test_missing_library_is_a_note(tmp_path):
    (tmp_path / "timm.py").write_text("raise ImportError('hidden')")
    out = run("--models", "resnet18", "--out", str(tmp_path), path=tmp_path)
    assert "without figures: resnet18" in out
    [row], [note] = read_rows(tmp_path / "zoo.csv"), read_rows(tmp_path / "zoo_notes.csv")
    assert (row["model"], row["source"], row["trains"]) == ("resnet18", "timm", "")
    assert note["note"] == "timm is not installed"


def test_earlier_rows_are_kept_and_held_to_the_goals(tmp_path):
    earlier = "llama,transformers,True,True,0.5,nan,0,0.1,600,1.25\n"
    (tmp_path / "zoo.csv").write_text(f"{HEADER}\n{earlier}")
    out = run("--models", "llama", "--out", str(tmp_path))
    assert (tmp_path / "zoo.csv").read_text().endswith(earlier)
    assert "missed: coverage at least 95 %: llama" in out
    assert "missed: compile ratio at most 1.10: llama" in out
    assert "not measured: semantic" in out
    assert "missed: trains" not in out
