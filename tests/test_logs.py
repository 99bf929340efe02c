"""What a user of torch finds where a user of torch looks: TORCH_LOGS, TORCH_TRACE, counters, a profiler's trace."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Block, compile_all, train_step
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import cacompile

ROOT = Path(__file__).parents[1]
TRAINING = """
import sys, torch
sys.path.insert(0, "tests")
from helpers import Block
import cacompile

model = Block()
settings = {"inner": "aot_eager", "block_rows": 16, "warmup_steps": 4, "monitor_every": 5}
run = torch.compile(model, backend="convaware", options=settings)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
cacompile.session(model).pin(keep=1.0)
for step in range(12):
    if step == 6:
        cacompile.session(model).pin([False, True, True, True])
    run(torch.randn(8, 32)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def train(**environment: str) -> str:
    """What a training run of 12 steps, half of them with a mask, prints."""
    plain = {name: value for name, value in os.environ.items() if name not in ("TORCH_LOGS", "TORCH_TRACE")}
    result = subprocess.run(
        [sys.executable, "-c", TRAINING],
        env={**plain, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.mark.parametrize(
    ("level", "details"), [("cacompile", False), pytest.param("+cacompile", True, marks=pytest.mark.slow)]
)
def test_torch_logs(level: str, details: bool) -> None:
    lines = [line for line in train(TORCH_LOGS=level).splitlines() if "cacompile/" in line]
    text = "\n".join(lines)
    assert "[0/0] graph 0/0: 2 gradients in 4 groups can be skipped (100.0% of dW FLOPs), 2 stay dense" in text
    assert "masked backward compiled, 2 of 2 gradients masked" in text
    assert "step 5: 0 of 4 groups are skipped next" in text
    assert "step 10: 1 of 4 groups are skipped next, 25.0% of dW FLOPs" in text
    assert ("up.bias stays dense: one-dimensional" in text) == details
    assert ("backward is masked from now on" in text) == details
    if not details:
        assert len(lines) == 4, "a line a step is too much at INFO"


@pytest.mark.slow
def test_without_torch_logs_nothing_is_said() -> None:
    assert "cacompile" not in train()


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of one training run with TORCH_TRACE."""
    folder = tmp_path_factory.mktemp("trace")
    train(TORCH_TRACE=str(folder))
    (log,) = folder.iterdir()
    return log


def test_torch_trace_has_the_plan_and_the_masked_backward(trace: Path) -> None:
    text = trace.read_text()
    entries = [json.loads(line[line.index("{") :]) for line in text.splitlines() if '"artifact"' in line]
    ours = {e["artifact"]["name"]: e for e in entries if e["artifact"]["name"].startswith("convaware")}
    assert set(ours) == {"convaware_plan", "convaware_masked_backward"}
    for entry in ours.values():
        assert (entry["frame_id"], entry["frame_compile_id"]) == (0, 0), "not listed with its compilation"
    assert "down.weight  32x64" in text and "up.neurons" in text and "4 groups in 1 families" in text
    assert "torch.ops.cacompile.masked_mm.default" in text and "dw_up_weight" in text


@pytest.mark.skipif(shutil.which("tlparse") is None, reason="tlparse is not installed")
def test_tlparse_shows_them(trace: Path, tmp_path: Path) -> None:
    page = tmp_path / "page"
    subprocess.run(["tlparse", "--no-browser", "-o", str(page), str(trace)], check=True, capture_output=True)
    found = {path.name.rsplit("_", 1)[0]: path.read_text() for path in page.glob("*/convaware_*.txt")}
    assert "up.bias" in found["convaware_plan"]
    assert "masked_mm" in found["convaware_masked_backward"]
    assert "convaware_plan" in (page / "index.html").read_text()


def test_counters() -> None:
    counters["cacompile"].clear()
    model, x = Block(), [torch.randn(8, 32)]
    pair = model, compile_all(model, "convaware", options={"inner": "aot_eager"})
    train_step(pair, x)
    expected = {
        "graphs": 1,
        "dense parameters": 2,
        "dense: one-dimensional, a cheap reduction": 2,
        "versions compiled: dense": 1,
    }
    assert counters["cacompile"] == expected
    cacompile.explain(Block(), *x, options={"block_rows": 16})
    assert counters["cacompile"] == expected, "looking has left a trace"
    for keep in (0.0, 0.0, 1.0):
        cacompile.session(model).pin(keep=keep)
        train_step(pair, x)
    made = {"versions compiled: masked": 1, "masked parameters": 2, "version switches": 2}
    assert counters["cacompile"] == expected | made


@pytest.mark.parametrize("inner", ["inductor", "aot_eager"])
def test_a_profile_shows_what_was_skipped(inner: str, tmp_path: Path) -> None:
    model, x = Block(), [torch.randn(8, 32)]
    pair = model, compile_all(model, "convaware", options={"inner": inner})
    train_step(pair, x)
    assert events_of(pair, x, tmp_path).keys() == {"convaware backward: dense"}

    cacompile.session(model).pin({"up.neurons[16:32]": False})
    unwatched = train_step(pair, x)
    events = events_of(pair, x, tmp_path)
    backward = "convaware backward: masked, 1 of 4 groups skipped"
    weights = [f"convaware dW {name}.weight: 3 of 4 blocks on" for name in ("up", "down")]
    assert events.keys() == {backward, *weights, "cacompile::masked_mm"}
    for weight in weights:
        inside = [e for e in events["cacompile::masked_mm"] if spans(e, events[weight][0])]
        assert len(inside) == 1 and spans(events[backward][0], inside[0])
    for name, grad in train_step(pair, x).grads.items():
        assert torch.equal(grad, unwatched.grads[name]), name


def events_of(pair: Any, x: Any, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Our events in the exported trace of one step, by name."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        train_step(pair, x)
    profiled.export_chrome_trace(str(folder / "trace.json"))
    found: dict[str, list[dict[str, Any]]] = {}
    for event in json.loads((folder / "trace.json").read_text())["traceEvents"]:
        if event["name"].startswith(("convaware", "cacompile")):
            found.setdefault(event["name"], []).append(event)
    return found


def spans(outer: dict[str, Any], inner: dict[str, Any]) -> bool:
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
