"""Every example and benchmark in its mode of seconds, as a user would call it."""

import importlib
import re
import runpy
import shutil
import sys
from importlib.metadata import version

import pytest
from scripts import ROOT, read_rows, run_module, run_script
from torch import nn

from benchmarks.gpu import tasks as gpu_tasks
from benchmarks.gpu.models import PRESETS
from benchmarks.quality import tasks as quality_tasks

COMMANDS = (
    "benchmarks.gpu.__main__",
    "benchmarks.gpu.quality",
    "benchmarks.kernels.docs",
    "benchmarks.kernels.tune",
    "benchmarks.pages",
    "benchmarks.quality.__main__",
    "benchmarks.quality.policies",
    "benchmarks.quality.signal",
    "benchmarks.speed.alive",
    "benchmarks.speed.controller",
    "benchmarks.speed.fine_tuning",
    "benchmarks.speed.flipping",
    "benchmarks.speed.host_time",
    "benchmarks.speed.overhead",
    "benchmarks.speed.slow_link",
    "benchmarks.speed.startup",
    "benchmarks.speed.step_time",
    "benchmarks.speed.truncated",
    "benchmarks.zoo.__main__",
    "benchmarks.zoo.removal",
    "benchmarks.zoo.scale",
)


@pytest.mark.parametrize("module", COMMANDS)
def test_benchmark_says_how_it_is_called(module, capsys):
    if module == "benchmarks.kernels.docs":
        pytest.importorskip("triton", exc_type=ImportError)
    if module == "benchmarks.speed.fine_tuning":
        pytest.importorskip("peft")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(["--help"])
    assert end.value.code == 0
    assert f"python -m {module.removesuffix('.__main__')} " in capsys.readouterr().out


@pytest.mark.parametrize("module", [name for name in COMMANDS if name.startswith("benchmarks.speed.")])
def test_a_folder_is_no_result_file_and_that_is_said_before_anything_is_measured(module, tmp_path, capsys):
    if module == "benchmarks.speed.fine_tuning":
        pytest.importorskip("peft")
    with pytest.raises(SystemExit):
        importlib.import_module(module).main(["--out", str(tmp_path)])
    assert "--out: must be a file, got the folder" in capsys.readouterr().err


def test_every_benchmark_that_is_a_command_is_here_and_in_the_readme():
    folder = ROOT / "benchmarks"
    files = (file for file in folder.rglob("*.py") if "argparse.ArgumentParser(" in file.read_text())
    found = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    assert found == set(COMMANDS)
    readme = (folder / "README.md").read_text()
    assert not [name for name in found if f"`python -m {name.removesuffix('.__main__')}`" not in readme]


@pytest.mark.parametrize("name", ("train_gpt", "train_vision", "explain", "hf_trainer", "accelerate_loop"))
def test_example_says_how_it_is_called(name, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    assert end.value.code == 0
    assert "--" in capsys.readouterr().out


TINY = [
    *(pytest.param(task.tiny, id=task.name) for task in quality_tasks.TASKS.values()),
    *(pytest.param(task.tiny, id=f"gpu {task.name}") for task in gpu_tasks.TASKS.values()),
    *(pytest.param(preset.tiny, id=f"gpu {name}") for name, preset in PRESETS.items()),
]


@pytest.mark.parametrize("make", TINY)
def test_tiny_models_keep_clear_of_what_onednn_writes_past_its_memory(make):
    """See docs/faq.md."""
    convs = [module for module in make().modules() if isinstance(module, nn.Conv2d)]
    strided = [conv for conv in convs if set(conv.kernel_size) == {1} and conv.stride != (1, 1)]
    assert all(conv.in_channels >= 16 for conv in strided), strided


def run(script: str, *arguments: str) -> str:
    return run_script(script, "--smoke", *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["examples/train_gpt.py", "examples/train_vision.py"])
def test_example_compares_and_draws(script, tmp_path):
    options = ["warmup_steps=2", "monitor_every=1", "tolerance=1.0", "block_rows=16", "max_skip=1.0"]
    out = run(script, "--out", str(tmp_path), *(word for option in options for word in ("--option", option)))
    assert "dW FLOPs skipped" in out
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    ours = [row for row in read_rows(tmp_path / "curves.csv") if row["arm"] == "convaware"]
    assert float(ours[0]["skipped_dw_flops"]) == 0.0
    assert any(float(row["skipped_dw_flops"]) > 0.0 for row in ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        "step_time",
        "step_time --model minilm",
        "startup",
        "controller",
        f"host_time --against {ROOT}",
        f"alive --against {ROOT}",
        "truncated",
        "flipping",
        "fine_tuning",
    ],
)
def test_benchmark_writes_its_rows(command, tmp_path):
    name, *more = command.split(" ", 2)
    out = run_module(f"benchmarks.speed.{name}", "--smoke", "--out", str(tmp_path / "rows.csv"), *more)
    assert "median [quartiles]" in out
    rows = read_rows(tmp_path / "rows.csv")
    assert rows
    assert all(float(row["lower_quartile"]) <= float(row["median"]) <= float(row["upper_quartile"]) for row in rows)


@pytest.mark.parametrize("flops, skipped", [(0.1, 0.5), (0.2, 1.0), (0.0, 0.0)])
def test_what_a_clock_keeps_is_in_proportion_to_what_is_skipped(flops, skipped):
    from benchmarks.speed import step_time

    found = step_time.kept(time=1.0 - flops / 2, flops=flops, skipped=skipped, oracle=0.9)
    expected = {step_time.FLOPS_KEPT: 0.5, step_time.ORACLE_KEPT: 1.0} if skipped else {}
    assert found == pytest.approx(expected)


def test_startup_goes_on_after_an_interruption(monkeypatch, tmp_path, capsys):
    from benchmarks.speed import startup

    calls = []

    def child(backend, cache, artifacts, kind, args):
        calls.append((backend, kind))
        if len(calls) == 14:
            raise KeyboardInterrupt
        return dict.fromkeys(startup.MEASURES + startup.COUNTS, float(len(calls)))

    monkeypatch.setattr(startup, "child", child)
    call = ["--rounds", "2", "--out", str(tmp_path / "rows.csv")]
    with pytest.raises(KeyboardInterrupt):
        startup.main(call)
    startup.main(call)
    assert len(calls) == 14 + 9 and "going on after 1 rounds" in capsys.readouterr().out
    assert calls[9:13] == calls[14:18], "in the same order"
    assert {row["rounds"] for row in read_rows(tmp_path / "rows.csv")} == {"2"}
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]
    startup.main(call)
    assert len(calls) == 14 + 9 + 18, "what is finished is measured anew"


@pytest.mark.slow
def test_policies_are_compared_at_the_same_skipped_share(tmp_path):
    call = ("benchmarks.quality.policies", "--smoke", "--seeds", "0", "--out", str(tmp_path))
    out = run_module(*call)
    rows = read_rows(tmp_path / "policies.csv")
    assert len(rows) == len({row["variant"] for row in rows}) > 8 and all(row["variant"] in out for row in rows)
    # half of dW in half of the run, of groups that are few
    assert all(0.1 < float(row["skipped_share"]) < 0.45 for row in rows), rows
    assert len({row["quality"] for row in rows}) > 8
    weights = ("each group on its own", "weight 1", "weight k (control variate)")
    by = {row["variant"]: row["quality"] for row in rows}
    assert len({by[f"uniform, {each}"] for each in weights}) == 3, "what comes back is weighted in three ways"
    assert run_module(*call) == out, "nothing is run again"


@pytest.mark.slow
def test_signal_is_measured_once_for_each_run(tmp_path):
    call = ("benchmarks.quality.signal", "--smoke", "--tasks", "vit,gpt", "--out", str(tmp_path))
    run_module(*call)
    rows = read_rows(tmp_path / "signal.csv")
    assert [row["task"] for row in rows] == ["vit", "gpt"]
    assert all(0.0 < float(row["signal 1"]) < 2.0 and 0.5 < float(row["attainable"]) < 2.0 for row in rows), rows
    before = (tmp_path / "signal.csv").read_bytes()
    run_module(*call)
    assert (tmp_path / "signal.csv").read_bytes() == before, "nothing is run again"


@pytest.mark.slow
def test_gpu_benchmark_checks_itself_without_a_gpu(tmp_path):
    pytest.importorskip("triton", exc_type=ImportError)
    if version("triton").startswith("3.6") and int(version("numpy").split(".")[1]) >= 4:
        pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4")
    run_module("benchmarks.gpu", "--self-check", "--out", str(tmp_path), timeout=900)
    rows = read_rows(tmp_path / "self_check.csv")
    assert not [row for row in rows if row["measure"] in ("failed", "not run")]
    assert {row["benchmark"] for row in rows} == {"gpu check", "gpu kernels", "gpu models"}
    assert {"inductor", "convaware dense", "convaware keep 0.5", "oracle"} <= {row["arm"] for row in rows}
    assert "Nothing." in (tmp_path / "self_check.md").read_text()
    for part in ("kernels", "models"):
        assert (tmp_path / f"self_check_{part}.png").stat().st_size > 10_000


PIPELINES = ["hf_trainer", "accelerate_loop", "lightning_module", "config_train"]


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_skips_and_says_so(name, tmp_path):
    out = run(f"examples/{name}.py", *([] if name == "config_train" else ["--out", str(tmp_path)]))
    share = re.search(r"([\d.]+)% of dW, [\d.e+]+ of [\d.e+]+\)", out)
    assert share and 5.0 < float(share[1]) < 95.0, out
    if name in ("hf_trainer", "accelerate_loop"):
        end = tmp_path / "checkpoint-8"
        if end.exists():
            shutil.rmtree(end)  # so that the last one is that of the middle
        again = run(f"examples/{name}.py", "--out", str(tmp_path), "--resume")
        assert said(again) == said(out), "a new process must end as the first one did"


def said(out: str) -> str:
    """From the status on."""
    return out[out.index("step 8:") :].split("{")[0]
