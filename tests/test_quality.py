"""The quality benchmark: its arithmetic by hand, what is run and what is not, and all of it in its mode of seconds."""

import itertools
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scripts import read_rows, run_module

from benchmarks.quality.__main__ import main
from benchmarks.quality.arms import ARMS, CHOSEN, LOWER, random_groups, rated
from benchmarks.quality.curve import Arms, Worth, frontier, mean_worth, resampled, seed_worths, standard_error, worth
from benchmarks.quality.plan import Part, Settings, Turn, next_part, plan
from benchmarks.quality.policies import quarters
from benchmarks.quality.report import Found, against_goal, report, summarize, times, verdicts, within_error
from benchmarks.quality.rows import COLUMNS, LOOK_COLUMNS, append, keys, read, read_looks, write_profile
from benchmarks.quality.run import Run, train, trainable_flops
from benchmarks.quality.signal import attainable, foreseen
from benchmarks.quality.target import of_looks, to_target
from benchmarks.quality.task import constant, decaying
from benchmarks.quality.task import quality as measure_quality
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tuned import tuned
from benchmarks.quality.worker import spread
from cacompile.controller.optimizers import descent, statistic_of

RUNGS = ["dense", "dense-95", "dense-90", "dense-85", "dense-80", "dense-75"]


@pytest.mark.parametrize(
    "costs, qualities, left",
    [
        ([1, 2, 3], [1, 2, 3], [0, 1, 2]),
        ([1, 2, 3, 4], [1, 3, 2, 4], [0, 1, 3]),
        ([3, 2, 1], [1, 2, 3], [2]),
        ([2, 2, 1], [1, 2, 0], [2, 1]),  # of runs that cost the same the better
    ],
)
def test_on_the_frontier_is_what_beats_all_that_cost_no_more(costs, qualities, left):
    found = frontier(costs, qualities)
    assert [each.tolist() for each in found] == [[costs[i] for i in left], [qualities[i] for i in left]]


@pytest.mark.parametrize(
    "quality, cost, expected",
    [
        (-1.5, 60, Worth(90 / 60)),  # halfway between 80 and 100
        (-2.0, 80, Worth(1.0)),
        (-1.0, 80, Worth(100 / 80)),
        (-0.9, 80, Worth(100 / 80, "at least")),
        (-2.1, 80, Worth(80 / 80, "below")),
    ],
)
def test_worth_is_cost_of_the_dense_run_as_good(quality, cost, expected):
    found = worth([80, 100], [-2.0, -1.0], quality, cost)
    assert (found.ratio, found.bound) == (pytest.approx(expected.ratio), expected.bound)


def test_a_longer_run_that_came_out_worse_is_not_on_the_way():
    assert worth([100, 70, 90, 80], [3.0, 0.0, 1.0, 2.0], 2.0, 50).ratio == pytest.approx(80 / 50)
    assert worth([100, 70, 90, 80], [3.0, 0.0, 1.0, 2.0], 1.5, 50).ratio == pytest.approx(77.5 / 50)


def test_worth_says_what_it_does_not_know():
    assert [str(Worth(1.1234, bound)) for bound in ("", "at least", "below")] == ["1.123", "≥ 1.123", "< 1.123"]


def two_seeds() -> Arms:
    costs = np.array([[50.0, 100.0], [50.0, 100.0]])
    return Arms(costs, np.array([[0.0, 1.0], [1.0, 2.0]]), np.array([50.0, 50.0]), np.array([0.5, 2.0]))


def test_means_are_compared_with_mean_dense_runs_and_seeds_with_their_own():
    # mean quality 1.25 lies three quarters of the way from 0.5 to 1.5
    assert mean_worth(two_seeds()).ratio == pytest.approx(87.5 / 50)
    assert [w.ratio for w in seed_worths(two_seeds())] == pytest.approx([75 / 50, 100 / 50])


def test_resampling_spans_the_seeds():
    assert resampled(two_seeds()) == pytest.approx((1.5, 2.0))
    assert resampled(two_seeds().of([0])) == pytest.approx((1.5, 1.5))


def test_standard_error():
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / 3**0.5)
    assert np.isnan(standard_error([1.0]))


def test_verdicts():
    assert against_goal(Worth(1.2), 1.1) == "reached (1.200)"
    assert against_goal(Worth(1.2, "at least"), 1.1) == "reached (≥ 1.200)"
    assert against_goal(Worth(1.08), 1.2) == "falls short by 10.0% (1.080)"
    assert against_goal(Worth(1.3, "below"), 1.2).startswith("falls short")
    assert against_goal(Worth(1.1, "at least"), 1.2).startswith("not shown")


def test_final_quality_is_compared_on_the_same_seeds():
    def found(worse_by: float, seeds: list[int]) -> Found:
        quality = np.array([1.0, 2.0, 3.0])[seeds] - worse_by  # standard error of all 0.577
        return Found("", seeds, quality, quality, quality, 0.0)

    dense = found(0.0, [0, 1, 2])
    for seeds in ([0], [1, 2], [0, 1, 2]):
        assert ", within" in within_error(found(0.5, seeds), dense)
        assert ", not within" in within_error(found(0.6, seeds), dense)
        assert "above" in within_error(found(-0.1, seeds), dense)
        assert "to the bit" in within_error(found(0.0, seeds), dense)


def test_random_groups_come_near_what_is_wanted():
    flops, rng = np.array([1.0] * 10), np.random.default_rng(0)
    assert not random_groups(flops, 0.0, rng).any()
    assert random_groups(flops, 3.2, rng).sum() == 3
    assert random_groups(flops, 99.0, rng).all()
    drawn = np.mean([random_groups(flops, 3.0, rng) for _ in range(1000)], axis=0)
    assert np.abs(drawn - 0.3).max() < 0.06
    uneven = np.array([5.0, 3.0, 1.0])
    assert uneven[random_groups(uneven, 4.0, rng, tries=100)].sum() == 4.0


def write_rows(folder: Path) -> None:
    """Two seeds of ResNet: dense runs whose quality is their share of the steps plus the seed, and convaware."""
    for seed in (0, 1):
        for arm in (*RUNGS, "convaware"):
            share = ARMS[arm].fraction if arm != "convaware" else 0.8
            row = dict.fromkeys(COLUMNS, "") | {"task": "resnet", "arm": arm, "seed": seed, "split": "test"}
            row |= {"steps": round(20 * ARMS[arm].fraction), "cost_flops": 100 * share, "cost_seconds": 10.0 * share}
            row |= {"quality": (0.9 if arm == "convaware" else share) + seed, "accuracy": 0.5, "date": "2026-01-01"}
            row |= {"beside": {"dense": "convaware", "convaware": "dense" * (seed == 0)}.get(arm, "")}
            append(folder / "quality.csv", row)


def test_report_of_rows_made_by_hand(tmp_path):
    write_rows(tmp_path)
    rows = read(tmp_path / "quality.csv")
    ours = summarize(rows)[-1]
    assert (ours.arm, ours.seeds) == ("convaware", [0, 1])
    assert ours.worth.ratio == pytest.approx(90 / 80)
    assert [w.ratio for w in ours.by_seed] == pytest.approx([90 / 80, 90 / 80])
    assert ours.cost.tolist() == pytest.approx([0.8, 0.8])
    assert "0.800 [0.800, 0.800]" in times(rows)  # of the seed in which they took turns
    said = list(report(settings(tmp_path), ["resnet"]))
    apart = "0.1000 below full dense's (seed by seed 0.1000 ± 0.0000)"
    assert f"resnet: Final quality: {apart}, within its standard error, 0.5000." in said
    assert not any("Goal" in line for line in said)  # an early task has none
    assert len([line for line in said if "none was chosen" in line or "none stopped early" in line]) == 2
    assert [line for line in verdicts("fine-tuning", summarize(rows)) if "Goal" in line] == [
        "Goal 1.25 in FLOPs: falls short by 10.0% (1.125)."
    ]


def test_what_is_shown_of_some_leaves_the_files_alone(tmp_path, capsys):
    write_rows(tmp_path)
    asked = ["report", "--smoke", "--out", str(tmp_path)]
    assert main(asked) == 0
    written = {file: file.read_bytes() for file in tmp_path.glob("quality*")}
    assert {file.suffix for file in written} == {".csv", ".md", ".svg"}
    capsys.readouterr()
    assert main([*asked, "--tasks", "resnet", "--seeds", "0"]) == 0
    assert "| dense Inductor " in (shown := capsys.readouterr().out) and "Final quality" in shown
    for more in (["--seeds", "7"], ["--tasks", "gpt"], ["--split", "valid"]):
        assert main([*asked, *more]) == 1 and "no dense runs of these" in capsys.readouterr().out
    assert {file: file.read_bytes() for file in tmp_path.glob("quality*")} == written
    assert not list(report(Settings(out=tmp_path, smoke=True, split="valid"), ["resnet"]))


def test_rows_of_validation_data_are_reported_apart(tmp_path):
    write_rows(tmp_path)
    rows = pd.read_csv(tmp_path / "quality.csv")
    rows.assign(split="valid", seed=rows["seed"] + 100).to_csv(
        tmp_path / "quality.csv", mode="a", header=False, index=False
    )
    for split, name in (("valid", "quality-valid"), ("test", "quality")):
        list(report(Settings(out=tmp_path, smoke=True, split=split), ["resnet"]))
        assert f"measured on {split} data" in (tmp_path / f"{name}.md").read_text()
        assert (tmp_path / f"{name}.svg").exists()
    assert Settings(out=tmp_path, split="valid", scale=0.5).report == "quality-valid-0.5"


@pytest.mark.parametrize(
    "wrong",
    [
        ["--jobs", "0"],
        ["--jobs", "-1"],
        ["--steps-scale", "0"],
        ["--steps-scale", "nan"],
        ["--seeds", "a"],
        ["--arms", "x"],
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_run(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--smoke", "--out", str(tmp_path), *wrong])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and wrong[0] in said and wrong[1] in said and not any(tmp_path.iterdir())


def test_a_control_is_compared_on_the_seeds_that_both_were_made_from(tmp_path):
    """Random groups from seed 1 alone, where convaware does worse than on the mean."""
    write_rows(tmp_path)
    rows = read(tmp_path / "quality.csv")
    ours = rows["arm"] == "convaware"
    rows.loc[ours & (rows["seed"] == 1), "quality"] -= 0.12
    rows = pd.concat([rows, rows[ours & (rows["seed"] == 1)].assign(arm="random", quality=1.8)])
    assert "Not ahead of random on the 1 seed of both: 0.975 and 1.000." in list(verdicts("early", summarize(rows)))
    apart = summarize(rows[(rows["arm"] != "convaware") | (rows["seed"] == 0)])
    assert "Not compared with random: they have no seed in common." in list(verdicts("early", apart))


def test_of_a_run_made_twice_the_later_row_counts(tmp_path):
    write_rows(tmp_path)
    first = read(tmp_path / "quality.csv")
    write_rows(tmp_path)
    again = read(tmp_path / "quality.csv")
    assert len(again) == len(first) == 14
    assert keys(again) == keys(first)


def test_the_best_of_three_rates_is_chosen_on_validation_data_alone(tmp_path):
    def add(arm: str, seed: int, split: str, quality: float) -> None:
        row = dict.fromkeys(COLUMNS, "") | {"task": "vit", "arm": arm, "seed": seed, "split": split, "steps": 96}
        append(tmp_path / "quality.csv", row | {"quality": quality, "skipped_share": 0.0})

    names = [rated("dense-80", rate) for rate in (1.0, 1.5, 2.0)]
    assert names == ["dense-80", "dense-80x1.5", "dense-80x2"]
    for seed, qualities in ((100, (-1.0, -0.8, -0.9)), (101, (-1.0, -1.0, -0.7))):
        for name, quality in zip(names, qualities, strict=True):
            add(name, seed, "valid", quality)
    add("dense-80", 102, "valid", 5.0)  # a seed without the other rates tells nothing
    add("dense-80x1.5", 0, "test", 5.0)
    rows = read(tmp_path / "quality.csv")
    assert tuned(rows, "vit", "dense-80", 96) == "dense-80x2"
    assert tuned(rows, "vit", "dense-80", 97) == tuned(rows, "gpt", "dense-80", 96) == "dense-80"


def test_time_to_target_is_the_first_look_that_reaches_it_and_a_miss_is_infinite(tmp_path):
    """Dense ends at 1.0 and 3.0: the target is their mean, 2.0, less one standard error, 1.0."""
    write_looks(tmp_path)
    looks = read_looks(tmp_path / "quality_looks.csv")
    rows = read(tmp_path / "quality.csv")
    found = to_target(looks, rows)
    assert found["dense"] == (pytest.approx((1.0 + 0.6) / 2), pytest.approx((1.0 + 0.6) / 2), 0, 2)
    assert found["convaware"][2:] == (1, 2) and np.isinf(found["convaware"][0])
    of_one = [each[(each["arm"] == "dense") | (each["seed"] == 1)] for each in (looks, rows)]
    assert to_target(*of_one)["dense"] == (0.6, 0.6, 0, 1), "only seeds that both were run from are compared"
    early = of_looks(looks, "dense", [0, 1])
    assert [frame["cost_flops"].tolist() for frame in early] == [[60.0, 60.0], [80.0, 80.0]]
    assert of_looks(looks, "dense", [0, 1, 2]) == []
    ours = summarize(rows, looks)[-1]  # its mean, 0.75, is what dense had reached at a cost of 60
    assert ours.worth.ratio == pytest.approx(60 / 80) and ours.worth.bound == "below"


def write_looks(folder: Path) -> None:
    for arm, seed, steps in itertools.product(("dense", "convaware"), (0, 1), ((12, 60), (16, 80), (20, 100))):
        step, cost = steps
        quality = {"dense": (1 + 2 * seed) * cost / 100, "convaware": 0.5 + 0.5 * seed}[arm]
        key = {"task": "resnet", "arm": arm, "seed": seed, "split": "test", "steps": 20}
        found = {"cost_flops": cost * (1.0 if arm == "dense" else 0.8), "cost_seconds": cost / 10, "quality": quality}
        if step < 20:
            append(folder / "quality_looks.csv", {**key, "step": step, **found}, LOOK_COLUMNS)
        else:
            append(folder / "quality.csv", {**dict.fromkeys(COLUMNS, ""), **key, **found, "skipped_share": 0.0})


def test_a_smaller_batch_and_another_rate_change_what_they_say_and_nothing_else(tmp_path):
    here = settings(tmp_path)
    arms = [replace(here.arm(arm), backend=None) for arm in ("dense", "batch-60x2")]
    runs = [Run(here.task("resnet"), arm, 0) for arm in arms]
    seen: list[tuple[str, int]] = []
    train(runs, look=lambda run: seen.append((run.arm.name, run.step_number)))
    full, less = runs
    assert less.steps == full.steps and less.flops == pytest.approx(10 / 16 * full.flops, rel=0.01)
    assert less.peaks == [2 * peak for peak in full.peaks]
    assert seen == [("dense", step) for step in (12, 14, 16, 17, 18, 19)]


def test_turns_do_not_depend_on_runs_that_the_process_made_before(tmp_path):
    here = settings(tmp_path)
    found = []
    for _ in range(2):
        run = Run(here.task("resnet"), here.arm("convaware"), 0)
        run.step()
        found.append({name: state.key for name, state in run.session.params.items()})
    assert found[0] == found[1] and any(found[0].values())


@pytest.mark.parametrize("arm", ["lower", "lower-later"])
def test_a_lower_part_is_frozen_that_takes_a_third_of_a_step(arm, tmp_path):
    here = settings(tmp_path)
    run = Run(TASKS["transfer"], replace(here.arm(arm), backend=None), 0, steps=4)
    batch = next(run.task.batches(0))
    full, start = trainable_flops(run.model, batch), run.control.start * run.steps
    trained = []
    while not run.done:
        run.step()
        trained.append([param.requires_grad for param in run.model.parameters()])
    assert all(map(all, trained[: int(start)])) and not any(map(all, trained[int(start) :]))
    assert trained[-1] == sorted(trained[-1]), "what is frozen lies below all that is trained"
    assert 0.25 < 1.0 - trainable_flops(run.model, batch) / full <= LOWER


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_signal_is_the_part_of_the_expected_descent_that_the_next_gradient_confirms(name):
    param = torch.nn.Parameter(torch.zeros(64, 64))
    settings = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)([param], lr=0.0, **settings)
    torch.manual_seed(0)
    constant, found, read = torch.randn(64, 64), 0.0, 0.0
    for step in range(300):
        param.grad = constant + 3.0 * torch.randn(64, 64)
        if step > 100:
            kept = statistic_of(optimizer, optimizer.param_groups[0], param, step)
            found += float(foreseen(param.grad, kept).sum())
            read += float(descent(kept).sum())
        optimizer.step()
    # a mean over beta1 has (1 - beta1) / (1 + beta1) of the variance, which is 9 times the signal's square
    assert found / read == pytest.approx(1.0 / (1.0 + 9.0 * 0.1 / 1.9), rel=0.1)


def test_what_a_choice_is_worth_is_said_by_steps_that_did_not_choose_it():
    flops, one = np.array([10.0, 10.0, 10.0]), np.array([0.0, 1.0, 1.0])
    best = attainable(one, one, flops, 100.0)
    assert (best.figure, best.left_out) == (pytest.approx(1 / 0.9), pytest.approx(1 / 3))
    assert attainable(one, np.array([1.0, 0.0, 1.0]), flops, 100.0).figure == pytest.approx(0.5 / 0.9)
    assert attainable(np.ones(3), np.ones(3), flops, 100.0).figure == 1.0, "alike: nothing is left out"
    assert attainable(np.array([-0.1, 1.0, 1.0]), one, np.array([0.0, 10.0, 10.0]), 100.0).left_out == 0.0
    assert attainable(-one, one, flops, 100.0).left_out == 0.0
    assert np.isnan(attainable(one, -one, flops, 100.0).figure), "where nothing is won no share of it is anything"


def test_parts_are_of_neighbours_of_one_family():
    assert quarters(np.array([0] * 8 + [1] * 2 + [2] * 6)).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 6, 7, 8, 8, 9]


def test_schedules():
    assert constant(5, 100) == pytest.approx(6 / 11) == decaying(5, 100)
    assert constant(99, 100) == 1.0 and decaying(99, 100) < 0.06


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_what_it_names(name, tmp_path):
    """Its tiny model takes its batches, and what is trained of it takes a step."""
    task = settings(tmp_path).task(name)
    torch.manual_seed(0)
    model = task.build()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = task.optimizer(model)
    *inputs, target = next(task.batches(0))
    torch.nn.functional.cross_entropy(model(*inputs).flatten(0, -2), target.flatten()).backward()
    optimizer.step()
    moved = {name for name, param in model.named_parameters() if not torch.equal(param, before[name])}
    assert moved and moved <= {name for name, param in model.named_parameters() if param.requires_grad}
    quality, accuracy = measure_quality(task, model, "valid")
    assert quality < 0.0 < accuracy < 1.0


def settings(folder: Path):
    return Settings(out=folder, smoke=True)


def test_plan_leaves_out_what_is_done(tmp_path):
    here = settings(tmp_path)
    [part] = plan(["gpt"], ["dense", "convaware", "random", "gradskip"], [3], here, set())
    assert part.turns == (Turn(("dense", "convaware"), 3), Turn(("random",), 3))
    done = {here.key("gpt", arm, 3) for arm in ("dense", "convaware")}
    [part] = plan(["gpt"], ["dense", "convaware", "dense-90"], [3], here, done)
    assert (part.turns, part.steps) == ((Turn(("dense-90",), 3),), 18)
    assert plan(["gpt"], ["dense", "convaware"], [3], here, done) == []


def test_plan_makes_the_profile_that_a_control_needs(tmp_path):
    here = settings(tmp_path)
    done = {here.key("vit", "convaware", 0)}
    [part] = plan(["vit"], ["static"], [0], here, done)
    assert part.turns == (Turn(("convaware",), 0), Turn(("static",), 0))
    write_profile(here.profile("vit", 0), [0.0, 0.5])
    [part] = plan(["vit"], ["static"], [0], here, done)
    assert part.turns == (Turn(("static",), 0),)


def test_process_stays_with_its_task_then_helps_where_most_is_left(monkeypatch):
    monkeypatch.setattr("benchmarks.quality.plan.SECONDS", {"gpt": 2.0, "resnet": 1.0, "minilm": 5.0})
    parts = [Part("resnet", (), 100), Part("gpt", (), 100), Part("gpt", (), 100), Part("minilm", (), 50)]
    assert next_part(parts, [], None).task == "gpt"
    assert next_part(parts, [], "resnet").task == "resnet"
    assert next_part(parts, ["gpt"], None).task == "minilm"
    assert next_part([], ["gpt"], "gpt") is None


def run(*arguments: str) -> str:
    return run_module("benchmarks.quality", *arguments)


@pytest.mark.slow
def test_whole_command_then_nothing_left_to_do(tmp_path):
    call = ("--smoke", "--tasks", "gpt,resnet", "--seeds", "0", "--out", str(tmp_path))
    out = run(*call)
    rows = read_rows(tmp_path / "quality.csv")
    peers = [task for task, package in (("gpt", "grades"), ("resnet", "cac")) if find_spec(package)]
    usual = {*CHOSEN, "convaware", "tolerant", "random", "static", "lower", "lower-later"}
    assert {row["arm"] for row in rows} - {"grades", "grades-on", "gradskip"} == usual
    assert Counter(row["task"] for row in rows) == {
        t: len(usual) + (t in peers) * (2 if t == "gpt" else 1) for t in ("gpt", "resnet")
    }
    looks = read_rows(tmp_path / "quality_looks.csv")
    looked_at = {(row["task"], row["arm"]) for row in looks}
    assert looked_at == set(itertools.product(("gpt", "resnet"), ("dense", "convaware")))
    by_run = {(row["task"], row["arm"]): row for row in rows}
    for task in ("gpt", "resnet"):
        costs = [float(by_run[task, arm]["cost_flops"]) for arm in CHOSEN]
        assert costs == pytest.approx([costs[0] * share for share in (1.0, 0.8, 0.7, 0.6, 0.8, 0.6)], rel=0.05)
        ours = by_run[task, "convaware"]
        assert 0.05 < float(ours["skipped_share"]) < 1.0
        for control in ("random", "static"):  # whole groups, so not quite the same
            assert float(by_run[task, control]["skipped_share"]) == pytest.approx(
                float(ours["skipped_share"]), abs=0.03
            )
            assert float(by_run[task, control]["cost_flops"]) == pytest.approx(float(ours["cost_flops"]), rel=0.02)
        assert (ours["beside"], by_run[task, "dense"]["beside"]) == ("dense", "convaware")
        assert len(read_rows(tmp_path / "quality_profiles" / f"{task}-20-0.csv")) == 20
        assert f"{task}: To dense's mean quality" in out
    if "gpt" in peers:
        assert float(by_run["gpt", "grades"]["cost_flops"]) < float(by_run["gpt", "dense"]["cost_flops"])
    for name in ("quality.svg", "quality_skipped.svg"):
        assert (tmp_path / name).stat().st_size > 10_000
    assert "| convaware, default options" in (tmp_path / "quality.md").read_text()

    before = (tmp_path / "quality.csv").read_bytes()
    assert "0 runs to make" in run(*call)
    assert (tmp_path / "quality.csv").read_bytes() == before


@pytest.mark.slow
def test_one_crash_does_not_lose_the_others(tmp_path):
    part = Part("resnet", (Turn(("static",), 0), Turn(("dense-75",), 0)), 35)
    events = [(kind, what) for kind, what in spread([part], 1, settings(tmp_path)) if kind != "step"]
    (failed, (task, turn, text)), (made, row) = events
    assert (failed, task, turn.arms) == ("failed", "resnet", ("static",))
    assert "FileNotFoundError" in text  # convaware has left no profile
    assert (made, row["arm"], row["steps_taken"]) == ("row", "dense-75", 15)
