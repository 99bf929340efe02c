"""What takes long says how far it is: in place where somebody watches, else in the log alone."""

from __future__ import annotations

import io
import logging
import sys
import time

import pytest
import torch
from torch import nn

import cacompile
from cacompile import notes
from cacompile.explanation import progress as of
from cacompile.explanation.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("patience", [0.02, 60.0])
@pytest.mark.parametrize("watched", [True, False])
def test_a_line_is_kept_up_to_date_and_taken_away(watched: bool, patience: float, monkeypatch: pytest.MonkeyPatch):
    stream = Terminal() if watched else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(of, "PATIENCE", patience)
    monkeypatch.setattr(of, "EVERY", 0.02)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    with Progress("explain Model") as shown:
        for stage in ("first", "second") if patience < 1.0 else ():
            shown.stage(stage)
            time.sleep(0.3)
    lines = stream.getvalue().split("\r")
    seen = watched and patience < 1.0
    assert any(line.startswith("explain Model: first, ") for line in lines) is seen
    assert any(line.startswith("explain Model: second, ") for line in lines) is seen
    assert lines[-1] == "" and (len(lines) > 2 or not seen), "nothing is left on the line"


def test_explain_tells_its_stages(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="cacompile.explanation.progress"):
        cacompile.explain(nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 16)), torch.randn(4, 16))
    told = [record.getMessage().rpartition(", ")[0] for record in caplog.records]
    head = "explain Sequential: "
    stages = ["reading the forward pass", "graph 1: tracing forward and backward", "masked backward 1 of 1", "done"]
    assert told == [head + stage for stage in stages]


@pytest.mark.parametrize("slow", [True, False])
def test_a_compilation_that_a_step_waits_for_is_told_of(
    slow: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("cacompile.graph.log.SLOW", 0.0 if slow else 1e9)
    model = nn.Linear(16, 64)
    run = torch.compile(model, backend="convaware", options={"block_rows": 16, "inner": "aot_eager"})
    run(torch.randn(4, 16)).sum().backward()
    cacompile.session(model).pin(keep=0.5)
    run(torch.randn(4, 16)).sum().backward()
    told = [record.getMessage() for record in caplog.records if record.name == "cacompile.notes"]
    assert len(told) == slow and all("masked backward compiled, 1 of 1 gradients masked, " in line for line in told)


def test_a_note_is_seen_where_nobody_has_set_up_logging(capsys: pytest.CaptureFixture[str]):
    root, before = logging.getLogger(), (notes.notes.handlers[:], notes.notes.level)
    handlers, root.handlers = root.handlers, []
    notes.notes.handlers = []
    try:
        notes.say("8 of 12 weights can be skipped")
        assert capsys.readouterr().err == "8 of 12 weights can be skipped\n"
    finally:
        root.handlers, notes.notes.handlers = handlers, before[0]
        notes.notes.setLevel(before[1])
