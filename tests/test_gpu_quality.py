"""The quality benchmark for a GPU: what it runs in which order and time, its table by hand, and all of it on a CPU."""

import math
import os
from dataclasses import replace

import pytest
import torch
from scripts import read_rows, run_module

from benchmarks.gpu import minilm, quality
from benchmarks.gpu.quality_report import table, write_markdown
from benchmarks.gpu.quality_runs import COLUMNS, Turn, best_rate, read, turns
from benchmarks.gpu.tasks import NEEDS, TASKS, task_on
from benchmarks.gpu.worker import Failure
from benchmarks.quality import snippets
from benchmarks.quality.arms import ARMS
from benchmarks.quality.run import Run, train
from examples.data import text_batches

PAIR = ("dense", "convaware")


def rows_of(*turns_and_columns):
    """Rows of tiny runs, as they are read."""
    rows = {}
    for turn, *columns in turns_and_columns:
        for key, changed in zip(turn.keys(True), columns, strict=True):
            blank = {**dict.fromkeys(COLUMNS, "0"), "step_seconds": "1", "accuracy": "0.5"}
            rows[key] = {**blank, **{name: str(value) for name, value in changed.items()}}
    return rows


def test_the_most_telling_runs_come_first_and_the_rate_is_chosen_before_it_is_used():
    asked = []
    order = list(turns(["resnet18", "gpt"], [0, 1], lambda task: asked.append(task) or "dense-80x1.5"))
    assert [(turn.task, turn.arms, turn.seed, turn.split) for turn in order[:4]] == [
        ("resnet18", PAIR, 0, "test"),
        ("resnet18", ("dense-80",), 100, "valid"),
        ("resnet18", ("dense-80x1.5",), 100, "valid"),
        ("resnet18", ("dense-80x1.5",), 0, "test"),
    ]
    assert [(turn.task, turn.seed) for turn in order[8:]] == [("resnet18", 1)] * 2 + [("gpt", 1)] * 2
    assert asked == ["resnet18", "gpt"] * 2


@pytest.mark.parametrize("qualities, best", [((-2, -1), "dense-80x1.5"), ((-1, math.nan), "dense-80")])
def test_the_better_rate_on_validation_data(qualities, best):
    tried = [
        (Turn("gpt", (arm,), 100, "valid"), {"quality": quality})
        for arm, quality in zip(("dense-80", "dense-80x1.5"), qualities)
    ]
    assert best_rate(rows_of(tried[0]), "gpt", True) is None
    assert best_rate(rows_of(*tried), "gpt", True) == best


def test_table_by_hand(tmp_path):
    """Two seeds of the pair, one of the shorter run: the figure is of that one."""
    tried = [
        (Turn("gpt", (arm,), 100, "valid"), {"quality": -1 if arm == "dense-80" else -2})
        for arm in ("dense-80", "dense-80x1.5")
    ]
    dense = {"quality": -1.0, "cost_flops": 10, "cost_seconds": 20, "step_seconds": "nan 1 2 4"}
    ours = {"quality": -1.5, "cost_flops": 8, "cost_seconds": 18, "step_seconds": "1 1 nan 3", "skipped_share": 0.5}
    rows = rows_of(
        *tried,
        (Turn("gpt", PAIR, 0, "test"), dense, ours),
        (Turn("gpt", PAIR, 1, "test"), {**dense, "quality": -3.0}, ours),
        (Turn("gpt", ("dense-80",), 0, "test"), {"quality": -2.0, "cost_flops": 8, "cost_seconds": 16}),
    )
    full, shorter, convaware = (line.split(" | ") for line in table(rows, "gpt", [0, 1], True).splitlines()[2:])
    assert full[1:4] == ["2", "-2.0000 ± 1.0000", "50.00 ± 0.00"]
    assert shorter[1:5] == ["1", "-2.0000", "50.00", "0.800"]
    # quality -1.5 is half way between 8 and 10; 18 of 20 seconds for 9 of 10 FLOPs
    assert convaware[4:] == ["0.800", "0.875 [0.750, 1.000]", "50.0%", "18.0", "1.125", "1.000 |"]
    text = write_markdown(
        rows, tmp_path / "page.md", "A GPU", ["gpt"], [0, 1], [("minilm", "all", "all", "no data")], True
    )
    assert "# A GPU" in text and "| minilm | all | all | no data |" in text and "ResNet-18" not in text


def test_a_diverged_dense_run_has_no_figure():
    full, ours = {"quality": math.nan, "cost_flops": 10, "cost_seconds": 2}, {"quality": -1, "cost_flops": 8}
    rows = rows_of((Turn("gpt", PAIR, 0, "test"), full, ours), (Turn("gpt", ("dense-80",), 0, "test"), {"quality": -2}))
    assert table(rows, "gpt", [0], True).splitlines()[-1].endswith("|  |  |")


class Workers:
    """In the place of processes: a clock that goes on with each run, and rows without training."""

    def __init__(self, monkeypatch, seconds, broken=()):
        self.now, self.seconds, self.broken, self.made = 0.0, seconds, broken, []
        monkeypatch.setattr(quality.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(quality, "Worker", lambda: self)
        monkeypatch.setitem(NEEDS, "resnet18", lambda: None)
        monkeypatch.setitem(NEEDS, "minilm", self.no_data)

    def no_data(self):
        raise FileNotFoundError("no data")

    def call(self, function, turn, device, tiny, timeout):
        self.now += self.seconds
        if self.seconds > timeout:
            raise Failure("no answer")
        if turn.task in self.broken:
            raise Failure("it broke")
        self.made.append(turn)
        figures = {"quality": -1.0, "cost_flops": 1.0, "cost_seconds": 1.0, "accuracy": 0.5, "skipped_share": 0.0}
        return [
            {**dict.fromkeys(COLUMNS, ""), **key._asdict(), **figures, "step_seconds": "1"} for key in turn.keys(tiny)
        ]

    def stop(self):
        pass


def test_time_ends_what_is_begun_and_a_second_call_goes_on(monkeypatch, tmp_path, capsys):
    workers = Workers(monkeypatch, seconds=60)
    call = ["--self-check", "--seeds", "0,1", "--out", str(tmp_path)]
    assert quality.main([*call, "--minutes", "6"]) == 0
    assert len(workers.made) == 5, "the sixth would have ended when the time for the table had begun"
    page = (tmp_path / "self_check_quality.md").read_text()
    assert "| minilm | all | all | no data |" in page
    assert "| gpt | dense and convaware | 1, test | out of time |" in page
    assert "| resnet18 | dense and convaware | 0" not in page
    done = list(workers.made)
    assert quality.main([*call, "--minutes", "60"]) == 0
    assert len(workers.made) == len(set(workers.made)) == 12 and workers.made[:5] == done
    before = (tmp_path / "self_check_quality.csv").read_bytes()
    assert quality.main([*call, "--minutes", "60"]) == 0
    assert len(workers.made) == 12 and (tmp_path / "self_check_quality.csv").read_bytes() == before
    assert len(read(tmp_path / "self_check_quality.csv")) == 16


def test_a_task_that_fails_costs_itself_alone(monkeypatch, tmp_path):
    workers = Workers(monkeypatch, seconds=1, broken=("resnet18",))
    assert quality.main(["--self-check", "--out", str(tmp_path)]) == 1
    assert {turn.task for turn in workers.made} == {"gpt"}
    assert "failed: it broke" in (tmp_path / "self_check_quality.md").read_text()


@pytest.mark.parametrize("arguments, said", [([], "no GPU here"), (["--device", "cpu"], "is for --self-check")])
def test_without_a_gpu_it_says_so(arguments, said, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        quality.main(arguments)
    assert said in capsys.readouterr().err


def test_steps_timed_together_are_the_same_steps():
    arm = replace(ARMS["dense"], backend=None)
    text = torch.arange(1000, dtype=torch.uint8)
    task = task_on("gpt", "cpu", tiny=True)
    task = replace(task, steps=7, batches=lambda seed: text_batches(text, 2, 16, seed))
    runs = [Run(task, arm, 0, stride=stride) for stride in (1, 3)]
    train(runs, chunk=1)
    each, together = runs
    for one, other in zip(each.model.parameters(), together.model.parameters()):
        assert torch.equal(one, other)
    assert each.flops == together.flops and each.step_number == together.step_number == 7
    assert [len(set(together.seconds[at : at + 3])) for at in (0, 3, 6)] == [1, 1, 1]


def test_models_are_as_large_as_their_titles_say():
    with torch.device("meta"):
        sizes = {name: sum(param.numel() for param in TASKS[name].build().parameters()) for name in ("resnet18", "gpt")}
    assert sizes == pytest.approx({"resnet18": 11.2e6, "gpt": 38e6}, rel=0.01)


@pytest.mark.slow
def test_minilm_that_travels_is_the_packages(monkeypatch, tmp_path):
    try:
        snippets.find_packages()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(minilm, "KEPT", tmp_path / "minilm.pt")
    minilm._kept.cache_clear()
    try:
        kept, whole = minilm.classifier(), snippets.Classifier()
        whole.head = kept.head
        for part, (ids, attended, labels) in minilm.parts().items():
            theirs = snippets.snippets()[part]
            assert torch.equal(attended, theirs[1]) and torch.equal(labels, theirs[2])
            with torch.no_grad():
                torch.testing.assert_close(
                    kept(ids[:8], attended[:8]), whole(*(t[:8] for t in theirs[:2])), atol=2e-3, rtol=0
                )
    finally:
        minilm._kept.cache_clear()
    assert (tmp_path / "minilm.pt").stat().st_size < 34e6


@pytest.mark.slow
def test_whole_command_on_a_cpu_without_what_a_gpu_machine_may_lack(tmp_path):
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    for name in ("pandas", "tabulate", "rich", "typer"):
        (lacking / f"{name}.py").write_text(f"raise ImportError('{name} is not here')\n")
    path = os.pathsep.join(filter(None, (str(lacking), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    out = run_module("benchmarks.gpu.quality", "--self-check", "--out", str(tmp_path), environment=environment)
    rows = read_rows(tmp_path / "self_check_quality.csv")
    here = []
    for task, need in NEEDS.items():
        try:
            need()
            here.append(task)
        except FileNotFoundError:
            assert f"| {task} | all | all |" in out
    assert "gpt" in here
    for task in here:
        mine = {(row["arm"], row["split"]): row for row in rows if row["task"] == task}
        assert {*(("dense-80", "valid"), ("dense-80x1.5", "valid")), *((arm, "test") for arm in PAIR)} < set(mine)
        assert len(mine) == 5
        dense, ours = (mine[arm, "test"] for arm in PAIR)
        assert 0.05 < float(ours["skipped_share"]) < 1.0
        assert 0.7 < float(ours["cost_flops"]) / float(dense["cost_flops"]) < 1.0
        assert len(ours["step_seconds"].split()) == 4
        assert (ours["beside"], dense["beside"]) == ("dense", "convaware")
    assert "failed" not in out and "out of time" not in out
