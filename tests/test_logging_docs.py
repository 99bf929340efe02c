"""docs/logging.md: its blocks run, its table is the keys that there are, and loggers take what they are given."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import DOCS, blocks

import cacompile
from cacompile.controller import weigh
from cacompile.sessions.status import LOGGED

EXAMPLES = {block.section: block for block in blocks("logging.md")}
PAGE = (DOCS / "logging.md").read_text(encoding="utf-8")


def executed(section: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(EXAMPLES[section].text, "docs", "exec"), names)
    return names


def test_the_table_has_every_key_and_says_what_it_is():
    rows = re.findall(r"^\| `convaware/(\w+)` \| (.+) \| (0 to 1|FLOPs) \|$", PAGE, re.M)
    assert [name for name, *_ in rows] == list(LOGGED)
    assert all((unit == "FLOPs") == name.endswith("_flops") for name, _, unit in rows)
    assert all(("0 to 1" in LOGGED[name]) == (unit == "0 to 1") for name, _, unit in rows)


def test_the_table_has_every_reason():
    for reason in (weigh.UNREAD, weigh.FAST, weigh.DEAR, weigh.SMALL, weigh.NO_ROOM, weigh.JUMPED):
        assert f"| {reason} |" in PAGE
    assert weigh.NOTHING_WON.partition(",")[0] in PAGE


def test_a_plain_loop_writes_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    model = executed("A plain loop")["model"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(line.keys() == {"step", "loss"} | {f"convaware/{name}" for name in LOGGED} for line in lines)
    assert all(0.0 <= line[f"convaware/{name}"] <= 1.0 for line in lines for name in LOGGED if "flops" not in name)
    assert lines[-1]["convaware/dw_of_step"] == pytest.approx(0.4)  # the first layer has no dX
    assert "weights can be skipped, from step 4 on" in capsys.readouterr().out
    assert cacompile.session(model).losses[0].tolist() == [4, 8, 12]


@pytest.mark.parametrize(
    ("section", "module", "function"),
    [("Weights & Biases", "wandb", "log"), ("MLflow", "mlflow", "log_metrics"), ("TensorBoard", "", "")],
)
def test_loggers_take_it(section: str, module: str, function: str, monkeypatch: pytest.MonkeyPatch):
    """Recorded in the place of the libraries: names as MLflow, the strictest, allows them, and finite floats."""
    model, seen = torch.nn.Linear(16, 16), dict[str, Any]()
    run = torch.compile(model, backend="convaware", options={"inner": "aot_eager"})
    run(torch.randn(4, 16)).sum().backward()
    if module:
        stands_in: Any = types.ModuleType(module)
        setattr(stands_in, function, lambda values, step: seen.update(values, step=step))
        monkeypatch.setitem(sys.modules, module, stands_in)
        executed(section)["log"](model, 0.5, 3)
    else:
        writer = types.SimpleNamespace(add_scalar=lambda name, value, step: seen.update({name: value, "step": step}))
        executed(section)["log"](writer, model, 0.5, 3)
    assert seen.pop("step") == 3 and seen.pop("loss") == 0.5
    assert seen == cacompile.status(model).to_dict() and seen.keys() == {f"convaware/{name}" for name in LOGGED}
    assert all(type(value) is float and re.fullmatch(r"[/\w.\- ]+", name) for name, value in seen.items())
