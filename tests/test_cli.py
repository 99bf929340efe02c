"""The command line, called in this process and as its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch.distributed import checkpoint as distributed_checkpoint
from typer.testing import CliRunner

import cacompile
from cacompile import doctor, torch_internals
from cacompile.cli import app
from cacompile.doctor import OPTIONAL, Check, examine
from cacompile.saved import find_state

FACTORIES = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)

    def forward(self, x, scale=1.0):
        return self.down(torch.relu(self.up(x))) * scale

def one(): return Model(), torch.randn(8, 32)
def several(): return Model(), (torch.randn(8, 32), 2.0)
def named(): return Model(), {"x": torch.randn(8, 32)}
def alone(): return Model()
def three(): return Model(), torch.randn(8, 32), 1
def wanting(x): return x
number = 3
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    file = tmp_path / "factories.py"
    file.write_text(FACTORIES)
    return file


def call(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    assert "\x1b" not in result.output, "colors in what is no terminal"
    return result.output


@pytest.mark.parametrize("factory", ["one", "several", "named"])
def test_explain(factory: str, factories: Path) -> None:
    text = call("explain", f"{factories}:{factory}", "--block-rows", 16)
    (row,) = [line.split() for line in text.splitlines() if line.lstrip().startswith("up.weight")]
    assert row[1:3] == ["64x32", "50.0%"] and "up.neurons" in row and row[-1] == "masked_mm"
    assert "dense: one-dimensional, a cheap reduction" in text
    assert "2 of 4 parameters masked: " in text
    assert "100.0% of dW FLOPs (counted), 100.0% of those in groups with a meaning, 1 family" in text


def test_explain_by_module_writes_files(factories: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(factories.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for suffix, start in ((".json", "{"), (".svg", "<svg"), (".html", "<!")):
        out = factories.parent / f"found{suffix}"
        assert f"written: {out}" in call("explain", "factories:one", "--out", out)
        assert out.read_text().lstrip().startswith(start)
    assert json.loads((factories.parent / "found.json").read_text())["coverage"] == 1.0


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("{}:alone", "give example inputs"),
        ("{}:three", "must return model or (model, example_inputs), got 3 values"),
        ("{}:number", "must be callable, got int"),
        ("{}:wanting", "wanting must be callable without arguments: missing a required argument: 'x'"),
        ("{}:nothing", "nothing"),
        ("{}", "expected module:factory or file.py:factory"),
        ("no_such_module_here:make", "no_such_module_here"),
        ("missing.py:make", "no such file: missing.py"),
    ],
)
def test_explain_says_what_is_wrong(target: str, words: str, factories: Path) -> None:
    text = call("explain", target.format(factories), code=2)
    assert text.startswith("error: ") and words in text


def test_explain_writes_no_other_format(factories: Path) -> None:
    assert "--out must end in .html, .svg, .json, got 'x.pdf'" in call("explain", "a:b", "--out", "x.pdf", code=2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session after a few steps, half of which skipped."""
    model, x = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(8, 16)
    compiled = torch.compile(model, backend="convaware", options={"block_rows": 8, "monitor_every": 1})
    optimizer, session = torch.optim.AdamW(model.parameters()), cacompile.session(model)
    for step in range(6):
        if step == 3:
            session.pin({session.families[0]: False})
        compiled(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    file = tmp_path_factory.mktemp("saved") / "session.pt"
    torch.save(session.state_dict(), file)
    return file


def test_report(saved: Path, tmp_path: Path) -> None:
    total, left_out = torch.load(saved, weights_only=True)["flops"]
    assert 0.0 < left_out < total
    assert f"of the FLOPs of 6 steps were skipped, {left_out / total:.1%} of dW" in call("report", saved)
    page = tmp_path / "run.html"
    assert f"written: {page}" in " ".join(call("report", saved, "--out", page).split())
    assert "FLOPs of 6 steps were skipped" in page.read_text(encoding="utf-8")


def test_report_says_what_is_wrong(saved: Path, tmp_path: Path) -> None:
    assert "no such file or folder: nothing.pt" in call("report", "nothing.pt", code=2)
    assert "path must end in" in call("report", saved, "--out", "run.pdf", code=2)
    torch.save({"weight": torch.ones(2)}, other := tmp_path / "model.pt")
    assert "holds no session of cacompile: it is a mapping with ['weight']" in call("report", other, code=2)
    torch.save([1], other)
    assert "it is list; save cacompile.session(model).state_dict()" in call("report", other, code=2)
    (text := tmp_path / "notes.txt").write_text("nothing to load")
    assert f"{text} cannot be read as what torch.save writes of plain values" in call("report", text, code=2)
    assert "it is none, or not whole" in call("report", text, code=2), "not the number that torch says"
    torch.save(nn.Linear(2, 2), whole := tmp_path / "whole.pt")
    said = call("report", whole, code=2)
    assert "it holds an object of torch.nn" in said and "trust" not in said, "no advice to run code of the file"
    whole.unlink()
    assert f"{tmp_path} holds no session" in call("report", tmp_path, code=2)
    state = torch.load(saved, weights_only=True)
    torch.save(state | {"format": 99}, other)
    assert "of format 4 to" in call("report", other, code=2), "the report's own words for a state of another version"
    torch.save({"one": state, "two": {"inner": state}}, other)
    assert "holds 2 sessions, at one, two.inner" in call("report", other, code=2)


def as_trainer(state: dict[str, Any], folder: Path) -> Path:
    """All checkpoints of a Trainer; the session's file is beside larger ones."""
    for step in (10, 20):
        (place := folder / f"checkpoint-{step}").mkdir()
        torch.save({"state": {}, "param_groups": []}, place / "optimizer.pt")
        torch.save(state, place / "cacompile.pt")
        os.utime(place, (step, step))
    return folder / "checkpoint-20" / "cacompile.pt"


def as_accelerate(state: dict[str, Any], folder: Path) -> Path:
    (folder / "random_states_0.pkl").write_bytes(b"not torch's")
    torch.save(state, folder / "custom_checkpoint_0.pkl")
    return folder / "custom_checkpoint_0.pkl"


def as_lightning(state: dict[str, Any], folder: Path) -> Path:
    checkpoint = {"epoch": 1, "state_dict": {"weight": torch.ones(2)}, "callbacks": {"cacompile": state}}
    torch.save(checkpoint, file := folder / "last.ckpt", _use_new_zipfile_serialization=False)
    return file


def as_distributed(state: dict[str, Any], folder: Path) -> Path:
    class Packed(cacompile.StatefulSession):
        def __init__(self) -> None:
            self._session = types.SimpleNamespace(state_dict=lambda: state)

    distributed_checkpoint.save(
        {"model": {"weight": torch.ones(2)}, "convaware": Packed()}, checkpoint_id=folder, no_dist=True
    )
    return folder


@pytest.mark.parametrize("save", [as_trainer, as_accelerate, as_lightning, as_distributed])
def test_report_of_a_checkpoint_folder(save: Any, saved: Path, tmp_path: Path) -> None:
    state = torch.load(saved, weights_only=True)
    where = save(state, tmp_path)
    found, loaded = find_state(tmp_path)
    assert found == where and loaded["flops"] == state["flops"]
    said = call("report", tmp_path)
    assert "of the FLOPs of 6 steps were skipped" in said and (f"from: {where}" in said) == (where != tmp_path)
    if where.is_file():
        assert find_state(where)[1]["flops"] == state["flops"]


def test_version_and_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # whatever shell runs the tests
    assert call("--version") == f"cacompile {cacompile.__version__}\n"
    assert "complete -o default" in call("--show-completion", "bash") and "--install-completion" in call("--help")


def states() -> dict[str, str]:
    return {check.name: check.state for check in examine()}


def test_doctor_finds_this_machine_fit() -> None:
    text = call("doctor")
    assert torch.__version__ in text and 'backend="convaware" is registered' in text and "dW on CPUs" in text
    assert "fails" not in states().values()
    if not torch.cuda.is_available():
        assert states()["GPU"] == states()["CUDA graphs"] == "note"


def test_doctor_fails_without_a_compiler() -> None:
    with inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        text = call("doctor", code=1)
    assert "no-such-compiler" in text and "aot_eager" in text


def test_doctor_fails_where_torch_compile_is_off() -> None:
    with torch._dynamo.config.patch(disable=True):
        text = call("doctor", "--test", code=1)
    assert "nothing is skipped" in text and "self test" not in text


def test_doctor_knows_the_versions_that_pyproject_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    (line,) = [
        line for line in (Path(__file__).parents[1] / "pyproject.toml").read_text().splitlines() if '"torch>=' in line
    ]
    assert f'"torch>={torch_internals.TESTED[0]}"' in line, "no upper bound: contracts are checked instead"
    for version, state in (("2.10.1", "fails"), ("2.99.0", "note")):
        monkeypatch.setattr(torch, "__version__", version)
        assert states()["torch"] == state


def test_doctor_tells_which_contract_does_not_hold() -> None:
    assert states()["torch's inside"] == "ok"
    with torch_internals.taken_away("compile_fx"):
        (check,) = (check for check in examine() if check.name == "torch's inside")
    assert check.state == "fails" and "compile_fx" in check.says and "compiling" in check.says
    with torch_internals.taken_away("eval_frame"):
        assert states()["torch's inside"] == "note", "training works without it"


def test_doctor_knows_all_that_may_be_installed() -> None:
    extras = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    wanted = {re.split("[><=]", each)[0] for name, own in extras.items() if name not in ("dev", "docs") for each in own}
    assert wanted == set(OPTIONAL)


def test_doctor_needs_no_extra() -> None:
    hide = "import sys; sys.modules['typer'] = sys.modules['rich'] = None; sys.argv = ['cacompile', 'doctor']\n"
    result = run_python("-c", f"{hide}from cacompile.__main__ import main\nmain()")
    assert result.returncode == 0, result.stderr
    assert "torch's inside" in result.stdout and torch.__version__ in result.stdout


@pytest.mark.parametrize("arguments, code", [(["--version"], 0), (["doctor", "--tset"], 2)])
def test_what_else_works_without_extras(arguments: list[str], code: int) -> None:
    hide = f"import sys; sys.modules['typer'] = None; sys.argv = ['cacompile', *{arguments}]\n"
    result = run_python("-c", f"{hide}from cacompile.__main__ import main\nmain()")
    assert result.returncode == code, result.stderr
    assert ("--tset" in result.stderr) if code else (result.stdout == f"cacompile {cacompile.__version__}\n")


def test_doctor_tests_itself() -> None:
    check = doctor.self_test()
    assert check.state == "ok" and "gradients as eager's, 25% of dW FLOPs skipped" in check.says, check


def test_a_self_test_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "self_test", lambda: Check("self test", "fails", "the gradient of 0.weight is wrong"))
    assert "the gradient of 0.weight is wrong" in call("doctor", "--test", code=1)


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_as_a_process() -> None:
    result = run_python("-m", "cacompile", "doctor")
    assert result.returncode == 0, result.stderr
    assert torch.__version__ in result.stdout and "\x1b" not in result.stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_without_its_libraries_it_says_what_to_install(missing: str) -> None:
    result = run_python(
        "-c", f"import sys; sys.modules['{missing}'] = None\nfrom cacompile.__main__ import main\nmain()"
    )
    assert result.returncode == 1 and "pip install 'cacompile[cli]'" in result.stderr
    assert missing in result.stderr and "Traceback" not in result.stderr
