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


NUMBER = re.compile(r"\d+\.\d+|\d+")


def holds(claim: str, line: str) -> bool:
    """Whether a line says what the guide claims, about the figures too: they depend on the machine, and not by much."""
    claim, line = (re.sub(r"\s+", " ", each).strip() for each in (claim, line))
    if VERSIONS.search(claim):
        return as_pattern(VERSIONS.sub("...", claim)).fullmatch(line) is not None
    literal = "".join(
        ".*" if part == "..." else "(-?[0-9.]+)" if NUMBER.fullmatch(part) else re.escape(part)
        for part in re.split(r"(\.\.\.|\d+\.\d+|\d+)", claim)
    )
    found = re.fullmatch(literal, line)
    return found is not None and all(map(near, NUMBER.findall(claim.replace("...", " ")), found.groups()))


VERSIONS = re.compile(r"\d+\.\d+\.\d+")


def near(claimed: str, found: str) -> bool:
    """Counts are equal; of what is measured a fourth is near, and of shares a sixth of the whole."""
    if "." not in claimed:
        return claimed == found
    number = float(claimed)
    return abs(float(found) - number) <= max(number / 4, 0.16 if 0.1 <= number <= 1.0 else 0.0)


@pytest.mark.parametrize(
    ("claim", "line", "expected"),
    [
        ("{'loss': '4.132', ... 'keep': '0.5714'}", "{'loss': '4.2', 'x': '1', 'keep': '0.6'}", True),
        ("{'loss': '4.132', ... 'keep': '0.5714'}", "{'loss': '4.2', 'x': '1', 'keep': '0.9'}", False),
        ("20 heads  keep 0.50", "20 heads keep 0.50", True),
        ("20 heads  keep 0.50", "80 heads keep 0.50", False),
        ("ok  cacompile  0.1.0, registered", "ok cacompile 0.2.0, registered", True),
        ("  lm_head.weight  9.1%  masked_mm", "lm_head.weight 3.1% masked_mm", False),
    ],
)
def test_figures_are_compared(claim: str, line: str, expected: bool) -> None:
    assert holds(claim, line) == expected


@pytest.mark.slow
def test_what_the_page_on_fine_tuning_says_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("fine-tuning.md"):
        exec(compile(block.text, "docs", "exec"), names)


@pytest.mark.slow
def test_it_does_and_prints_what_it_says(tmp_path: Path) -> None:
    printed = ""
    saved = []
    for block in STEPS:
        if block.language == "text":
            for claim in block.text.splitlines():
                assert any(holds(claim, line) for line in printed.splitlines()), (claim, printed)
        else:
            printed = run(block, tmp_path)
            if "python train.py" in block.text:
                total, left_out = torch.load(tmp_path / "run" / "checkpoint-80" / "cacompile.pt")["flops"]
                saved.append(left_out / total)
    assert "of the FLOPs of 80 steps were skipped" in (tmp_path / "run.html").read_text(encoding="utf-8")
    with open(tmp_path / "run.csv", newline="") as lines:
        head = [row for row in csv.DictReader(lines) if row["family"] == "lm_head.tokens"]
    keep = {int(row["step"]): float(row["keep"]) for row in head}
    assert {*keep.values()} == {1.0}, "lm_head is left alone: no other group does the same"
    default, turned_up, further = saved
    assert further > turned_up > default == 0.0
