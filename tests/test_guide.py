"""docs/guide.md, done by a new user: its blocks in order, in an empty folder, each in a process of its own."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from pages import Block, blocks
from scripts import ROOT

pytest.importorskip("transformers")

INSTALL, *STEPS = blocks("guide.md")


def without_figures(text: str) -> list[str]:
    """Lines with neither numbers nor the space that is made for them."""
    return [re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "#", line)).strip() for line in text.splitlines()]


def as_pattern(line: str) -> re.Pattern[str]:
    """`...` stands for anything."""
    return re.compile(".*".join(map(re.escape, line.split("..."))))


def run(block: Block, folder: Path) -> str:
    """What a block prints; a file if its first line names one, which prints nothing."""
    if name := re.match(r"# (\w+\.py)\n", block.text):
        (folder / name[1]).write_text(block.text, encoding="utf-8")
        return ""
    command = ["bash", "-ec", block.text] if block.language == "sh" else [sys.executable, "-c", block.text]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder, env=environment)
    assert done.returncode == 0, f"{block.text}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout


def test_what_it_installs_is_there_to_install() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (wanted,) = re.findall(r"pip install '\.\[([\w,]+)\]'", INSTALL.text)
    assert set(wanted.split(",")) <= extras.keys()


@pytest.mark.slow
def test_it_does_and_prints_what_it_says(tmp_path: Path) -> None:
    printed = ""
    saved = []
    for block in STEPS:
        if block.language == "text":
            claimed, found = without_figures(block.text), without_figures(printed)
            for line in claimed:
                assert any(map(as_pattern(line).fullmatch, found)), (line, printed)
        else:
            printed = run(block, tmp_path)
            if "python train.py" in block.text:
                total, left_out = torch.load(tmp_path / "run" / "checkpoint-80" / "cacompile.pt")["flops"]
                saved.append(left_out / total)
    assert "of the FLOPs of 80 steps were skipped" in (tmp_path / "run.html").read_text(encoding="utf-8")
    with open(tmp_path / "run.csv", newline="") as lines:
        head = [row for row in csv.DictReader(lines) if row["family"] == "lm_head.tokens"]
    keep = {int(row["step"]): float(row["keep"]) for row in head}
    assert keep[20] == 1.0 > keep[80], "lm_head is left alone while it moves"
    default, turned_down = saved
    assert default > turned_down > 0.0
