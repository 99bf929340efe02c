"""Every example and benchmark in its mode of seconds, as a user would call it."""

import re
import shutil
from importlib.metadata import version

import pytest
from scripts import read_rows, run_script


def run(script: str, *arguments: str) -> str:
    return run_script(script, "--smoke", *arguments)


@pytest.mark.parametrize("script", ["examples/train_gpt.py", "examples/train_vision.py"])
def test_example_compares_and_draws(script, tmp_path):
    options = ["warmup_steps=2", "monitor_every=1", "tolerance=1.0", "block_rows=16", "max_skip=1.0"]
    out = run(script, "--out", str(tmp_path), *(word for option in options for word in ("--option", option)))
    assert "dW FLOPs skipped" in out
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    ours = [row for row in read_rows(tmp_path / "curves.csv") if row["arm"] == "convaware"]
    assert float(ours[0]["skipped_dw_flops"]) == 0.0
    assert any(float(row["skipped_dw_flops"]) > 0.0 for row in ours)


@pytest.mark.parametrize("script", ["benchmarks/step_time.py", "benchmarks/startup.py", "benchmarks/controller.py"])
def test_benchmark_writes_its_rows(script, tmp_path):
    out = run(script, "--out", str(tmp_path / "rows.csv"))
    assert "median [quartiles]" in out
    rows = read_rows(tmp_path / "rows.csv")
    assert rows
    assert all(float(row["lower_quartile"]) <= float(row["median"]) <= float(row["upper_quartile"]) for row in rows)


def test_policies_are_compared_at_the_same_skipped_share(tmp_path):
    out = run("benchmarks/policies.py", "--seeds", "0", "--out", str(tmp_path))
    rows = read_rows(tmp_path / "policies.csv")
    assert len(rows) == len({row["variant"] for row in rows}) > 8 and all(row["variant"] in out for row in rows)
    # half of dW in half of the run, of groups that are few
    assert all(0.1 < float(row["skipped_share"]) < 0.45 for row in rows), rows
    assert len({row["quality"] for row in rows}) > 8
    assert run("benchmarks/policies.py", "--seeds", "0", "--out", str(tmp_path)) == out, "nothing is run again"


def test_gpu_benchmark_checks_itself_without_a_gpu(tmp_path):
    pytest.importorskip("triton", exc_type=ImportError)
    if version("triton").startswith("3.6") and int(version("numpy").split(".")[1]) >= 4:
        pytest.skip("the interpreter of triton 3.6 needs numpy < 2.4")
    run_script("benchmarks/gpu.py", "--self-check", "--out", str(tmp_path), timeout=900)
    rows = read_rows(tmp_path / "self_check.csv")
    assert not [row for row in rows if row["measure"] in ("failed", "not run")]
    assert {row["benchmark"] for row in rows} == {"gpu check", "gpu kernels", "gpu models"}
    assert {"inductor", "convaware dense", "convaware keep 0.5", "oracle"} <= {row["arm"] for row in rows}
    assert "Nothing." in (tmp_path / "self_check.md").read_text()
    for part in ("kernels", "models"):
        assert (tmp_path / f"self_check_{part}.png").stat().st_size > 10_000


PIPELINES = ["hf_trainer", "accelerate_loop", "lightning_module", "config_train"]


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_skips_and_says_so(name, tmp_path):
    out = run(f"examples/{name}.py", *([] if name == "config_train" else ["--out", str(tmp_path)]))
    share = re.search(r"dW FLOPs saved so far \(([\d.]+)%\)", out)
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
