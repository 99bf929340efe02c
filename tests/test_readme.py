"""What README, the pages beside it and the project's own files claim, as far as a machine can check it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from option_table import option_table
from pages import blocks_of
from scripts import ROOT
from torch import nn

import cacompile
from benchmarks.pages import OURS, TOLERANT, WORTH, Task, pages, read_rows, read_tasks
from cacompile import Config
from cacompile.torch_internals import TESTED

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_it_is_short_and_says_first_how_to_install() -> None:
    lines = README.splitlines()
    assert len(lines) <= 95 and lines.index("## Install") <= 20


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", README))
def test_links_lead_to_pages_of_the_docs(link: str) -> None:
    assert link.startswith("docs/"), "others are not found from the built docs, whose start page README is"
    assert (ROOT / link.partition("#")[0]).is_file()


def line_of(beginning: str) -> str:
    """A point of README's list, on one line."""
    (found,) = re.findall(rf"^- \*\*{re.escape(beginning)}.*?(?=^- |^$)", README, re.M | re.S)
    return " ".join(found.split())


def figures(text: str) -> list[str]:
    return re.findall(r"(?:[<≥] )?\d\.\d{3}", text)


def ratio(rows: list[dict[str, str]], **wanted: str) -> str:
    (row,) = (row for row in rows if wanted.items() <= row.items())
    return f"{float(row['median']):.3f}"


def test_times_are_those_of_the_results() -> None:
    step = {"measure": "whole step", "unit": "ratio to inductor"}
    steps = [ratio(read_rows("step_time_cpu.csv"), arm=arm, **step) for arm in ("dense", "keep 0.5", "keep 0")]
    case = {"case": "GPT of width 256, 4 blocks, 512 tokens", "measure": "whole step", "unit": "ratio to dense"}
    frozen = [ratio(read_rows("truncated_cpu.csv"), arm=arm, **case) for arm in ("frozen 0.5", "oracle 0.5")]
    assert figures(line_of("On a clock")) == [*steps, *frozen]


def test_fine_tuning_is_that_of_the_results() -> None:
    (said,) = re.findall(r"^A step of MiniLM .*?^are frozen", README, re.M | re.S)
    step = {"measure": "step", "unit": "ratio to all weights, Inductor"}
    ways = ("embeddings and lower half frozen", "LoRA, adapters of the lower half frozen")
    assert figures(said) == [ratio(read_rows("fine_tuning_cpu.csv"), arm=way, **step) for way in ways]


def task(beginning: str) -> Task:
    """The one whose title begins so."""
    (found,) = (each for each in read_tasks() if each.title.startswith(beginning))
    return found


def test_quality_is_that_of_the_results() -> None:
    minilm = "MiniLM-L6 fine-tuned on "
    epoch, short, half = (
        task(minilm + which).arms[OURS]
        for which in ("Rotten Tomatoes, one epoch", "snippets", "Rotten Tomatoes, lower half frozen")
    )
    said = [epoch[WORTH], *figures(epoch["95 %"]), short[WORTH], half[WORTH]]
    assert figures(line_of("For its quality")) == said
    scratch = [each for each in read_tasks() if "from scratch" in each.title]
    assert len(scratch) >= 6 and {each.arms[OURS]["dW skipped"] for each in scratch} == {"0.0%"}
    tolerant = task(minilm + "Rotten Tomatoes, one epoch").arms[TOLERANT][WORTH]
    (grades,) = (
        row for arm, row in task("GPT (Llama-style, d 128, 3 layers, 4096").arms.items() if arm.startswith("GradES")
    )
    assert figures(line_of("Not for nothing")) == [tolerant, grades[WORTH]]
    small = task("ViT (d 64, 4 layers) from scratch, in batches of 64")
    assert figures(line_of("Not everywhere")) == figures(small.time)[:1]


def test_tables_of_the_docs_are_those_of_the_results() -> None:
    stale = [page.name for page, now, anew in pages() if now != anew]
    assert not stale, "python -m benchmarks.pages writes them; look at the sentences beside them, too"


def test_all_options_are_in_the_table() -> None:
    for name in Config.__dataclass_fields__:
        assert f"| `{name}` | `{getattr(Config(), name)}` |" in option_table()


class Model(nn.Module):
    """What stands in for a reader's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.square().mean()


@pytest.mark.slow
def test_its_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    batches = [torch.randn(8, 32) for _ in range(3)]
    names: dict[str, Any] = {"Model": Model, "batches": batches, "example_batch": batches[0]}
    for block in blocks_of(README):
        if block.language == "python":
            exec(block.text, names)
    frozen = cacompile.session(names["model"]).frozen_since
    assert {name.split(".")[1] for name in frozen} == {"0", "1", "2"}
    printed = capsys.readouterr().out
    assert "groups skipped" in printed and "layers.5.weight" in printed
    assert "in 3 steps" in (tmp_path / "run.html").read_text(encoding="utf-8")


def workflow() -> Mapping[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]


def test_ci_runs_what_there_is_on_what_is_supported() -> None:
    jobs = workflow()
    assert jobs["tests"]["strategy"]["matrix"]["torch"] == list(TESTED_MINORS)
    pythons = jobs["wheel"]["strategy"]["matrix"]["python"]
    assert [f"Programming Language :: Python :: {each}" for each in pythons] == [
        line for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)
    ]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake (\w+)", " ".join(commands)):
        assert f"\n{target}:" in makefile, target
    for file in re.findall(r"tests/\w+\.py", " ".join(commands)):
        assert (ROOT / file).is_file(), file


TESTED_MINORS = dict.fromkeys(".".join(release.split(".")[:2]) for release in TESTED)


@pytest.mark.parametrize(
    "file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda file: file.stem
)
def test_templates_of_issues_ask_something(file: Path) -> None:
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert form["name"] and form["description"] and form["body"]
    assert all(each["type"] in ("textarea", "input") and each["attributes"]["label"] for each in form["body"])


def test_hooks_before_a_commit_are_what_make_check_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for hook in hooks:
        command = hook["entry"].removeprefix(".venv/bin/")
        assert f"$(BIN)/{command}" in makefile, hook


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == cacompile.__version__ and citation["license"] == PROJECT["license"]
    assert citation["abstract"] == PROJECT["description"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{cacompile.__version__}]" in changelog and "## [Unreleased]" in changelog


def test_public_names() -> None:
    assert dir(cacompile) == sorted(cacompile.__all__)
    assert (ROOT / "cacompile" / "py.typed").is_file()
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in set(cacompile.__all__) - {"__version__"}:
        assert getattr(cacompile, name).__doc__, name
        assert f"cacompile.{name}" in page, name


@pytest.mark.parametrize(("name", "code"), [pytest.param("cacompile", 0, marks=pytest.mark.slow), ("convaware", 1)])
def test_names_of_logs(name: str, code: int) -> None:
    """As docs/api.md says; if torch takes the backend's name some day, that page is to be changed."""
    ask = [sys.executable, "-c", "import torch"]
    done = subprocess.run(ask, env={"TORCH_LOGS": name, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("Invalid log settings: convaware" in done.stderr) == bool(code)
