"""Tables of `benchmarks.quality` in Markdown, with what they mean in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from benchmarks.lib.timing import Spread
from benchmarks.quality.arms import ARMS, DENSE
from benchmarks.quality.curve import Arms, Worth, mean_and_error, mean_worth, resampled, seed_worths, standard_error
from benchmarks.quality.plan import TIMED, Settings
from benchmarks.quality.plots import draw_curves, draw_profiles
from benchmarks.quality.rows import Key, read, read_looks, read_profile
from benchmarks.quality.target import of_looks, to_target
from benchmarks.quality.tasks import TASKS

GOALS = {"fine-tuning": (1.25, 1.15), "from scratch": (1.10, 1.05)}
"""For convaware, in FLOPs and in seconds: where the frontier of the dense runs reaches its quality, over its cost."""


@dataclass(frozen=True)
class Found:
    """An arm of a task over its seeds."""

    arm: str
    seeds: list[int]
    quality: np.ndarray
    accuracy: np.ndarray
    cost: np.ndarray
    """Over that of the full dense run of the same seed."""
    skipped: float
    compared_on: tuple[int, ...] = ()
    """The seeds from which all dense runs were made too."""
    arms: Arms | None = None
    """Of those seeds, beside the dense runs. None for dense runs but the full one, and where these are not complete."""
    in_seconds: Worth | None = None
    """`worth`, if a dense FLOP takes as long in all dense runs as in the full one beside it."""

    @property
    def worth(self) -> Worth | None:
        """In FLOPs."""
        return None if self.arms is None else mean_worth(self.arms)

    @property
    def by_seed(self) -> list[Worth]:
        return [] if self.arms is None else seed_worths(self.arms)

    def worth_on(self, seeds: Sequence[int]) -> Worth:
        """In FLOPs, of some of the seeds that it was compared on."""
        assert self.arms is not None
        return mean_worth(self.arms.of([self.compared_on.index(seed) for seed in seeds]))


def rows_of(rows: pd.DataFrame, settings: Settings, task: str, seeds: Sequence[int] | None = None) -> pd.DataFrame:
    """Rows of one task in the lengths that are asked for, sorted by seed. seeds: None for all there are."""
    seeds = sorted(set(rows["seed"])) if seeds is None else seeds
    wanted = [settings.key(task, arm, seed) for arm in ARMS for seed in seeds]
    index = pd.MultiIndex.from_frame(rows[list(Key._fields)])
    return rows[index.isin(wanted)].sort_values("seed")


def summarize(rows: pd.DataFrame, looks: pd.DataFrame | None = None) -> list[Found]:
    """All arms of one task that have rows; each over the seeds of which there is a full dense run too.

    looks: what the full dense run had reached along the way, which is what a run stopped early would have.
    """
    by_arm = {str(arm): each.set_index("seed") for arm, each in rows.groupby("arm")}
    if "dense" not in by_arm:
        return []
    rungs = [by_arm[arm] for arm in DENSE if arm in by_arm]
    stopped = [] if looks is None else of_looks(looks, "dense", list(by_arm["dense"].index))
    compared_with = [*rungs, *stopped]
    with_all = [seed for seed in by_arm["dense"].index if all(seed in rung.index for rung in rungs)]
    found = []
    for arm in (name for name in ARMS if name in by_arm):
        seeds = [seed for seed in by_arm[arm].index if seed in by_arm["dense"].index]
        if not seeds:
            continue
        each, full = by_arm[arm].loc[seeds], by_arm["dense"].loc[seeds]
        cost = each["cost_flops"].to_numpy() / full["cost_flops"].to_numpy()
        columns = (each["quality"].to_numpy(), each["accuracy"].to_numpy(), cost, float(each["skipped_share"].mean()))
        compared = [seed for seed in seeds if seed in with_all]
        if (arm in DENSE and arm != "dense") or len(compared_with) < 2 or not compared:
            found.append(Found(arm, seeds, *columns))
            continue
        costs, qualities = (np.stack([rung[name].loc[compared] for rung in compared_with], 1)
                            for name in ("cost_flops", "quality"))  # fmt: skip
        own = by_arm[arm].loc[compared]
        arms = Arms(costs, qualities, own["cost_flops"].to_numpy(), own["quality"].to_numpy())
        price = (full["cost_seconds"] / full["cost_flops"]).loc[compared].to_numpy()
        timed = arms._replace(costs=costs * price[:, None], cost=own["cost_seconds"].to_numpy())
        seconds = mean_worth(timed) if (own["beside"] == "dense").all() else None
        found.append(Found(arm, seeds, *columns, tuple(compared), arms, seconds))
    return found


def table(found: Sequence[Found]) -> str:
    """A line for each arm."""
    lines = [
        (
            ARMS[f.arm].title, len(f.seeds), mean_and_error(f.quality, "{:.4f}"),
            mean_and_error(100 * f.accuracy, "{:.2f}"),
            f"{f.cost.mean():.3f}", "" if f.arm in DENSE or np.isnan(f.skipped) else f"{f.skipped:.1%}",
            str(f.worth or ""), str(f.in_seconds or ""),
            "" if f.arms is None or len(f.compared_on) < 2 else "{:.3f} to {:.3f}".format(*resampled(f.arms)),
            ", ".join(map(str, f.by_seed)),
        )
        for f in found
    ]  # fmt: skip
    headers = ("arm", "seeds", "quality", "accuracy, %", "FLOPs / dense", "dW skipped",
               "frontier / own, FLOPs", "in seconds", "95 %", "seed by seed")  # fmt: skip
    return tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True)


def verdicts(goal: str, found: Sequence[Found]) -> Iterator[str]:
    """What the table says of convaware, in words. goal: of `Task`."""
    by_arm = {f.arm: f for f in found}
    ours, dense = by_arm.get("convaware"), by_arm.get("dense")
    if ours is None or dense is None:
        return
    if ours.worth is not None:
        for what, worth, wanted in zip(("FLOPs", "seconds"), (ours.worth, ours.in_seconds), GOALS.get(goal, ())):
            if worth is not None:
                yield f"Goal {wanted:.2f} in {what}: {against_goal(worth, wanted)}."
        if ours.worth.ratio < 1 or ours.worth.bound == "below":
            yield f"Loses against the dense runs ({ours.worth})."
        yield from (against(ours, f) for f in found if f.worth is not None and f is not ours)
    yield f"Final quality: {within_error(ours, dense)}."


def against(ours: Found, other: Found) -> str:
    """Which is worth more, on the seeds that both were made from."""
    seeds = [seed for seed in ours.compared_on if seed in other.compared_on]
    if not seeds:
        return f"Not compared with {other.arm}: they have no seed in common."
    mine, theirs = ours.worth_on(seeds), other.worth_on(seeds)
    which = "Ahead of" if mine > theirs else "Not ahead of"
    each = "1 seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"{which} {other.arm} on the {each} of both: {mine} and {theirs}."


def against_goal(worth: Worth, goal: float) -> str:
    if worth.ratio >= goal and worth.bound != "below":
        return f"reached ({worth})"
    if worth.bound == "at least":
        return f"not shown ({worth}: as good as the full dense run, which is all that it is compared with)"
    return f"falls short by {1 - worth.ratio / goal:.1%} ({worth})"


def within_error(ours: Found, dense: Found) -> str:
    """On the seeds that both were run from, against the standard error of all full dense runs; better is within.

    Seed by seed there is less noise than that: with two seeds or more its mean and standard error are told too.
    """
    full = dict(zip(dense.seeds, dense.quality, strict=True))
    apart = np.array([full[seed] for seed in ours.seeds]) - ours.quality
    short, error = apart.mean(), standard_error(dense.quality)
    if not apart.any():
        return "full dense's, to the bit"
    paired = f" (seed by seed {mean_and_error(np.sign(short) * apart, '{:.4f}')})" if len(apart) > 1 else ""
    if short < 0:
        return f"{abs(short):.4f} above full dense's{paired}"
    if np.isnan(error):
        return f"{short:.4f} below full dense's; one seed has no standard error"
    within = "within" if short <= error else "not within"
    return f"{short:.4f} below full dense's{paired}, {within} its standard error, {error:.4f}"


def times(rows: pd.DataFrame) -> str | None:
    """Seconds of convaware over dense's, of runs that took turns, and what FLOPs promise."""
    ours, dense = (
        rows[(rows["arm"] == arm) & (rows["beside"] == other)].set_index("seed")
        for arm, other in (reversed(TIMED), TIMED)
    )
    seeds = ours.index.intersection(dense.index)
    if seeds.empty:
        return None
    seconds, flops = (ours.loc[seeds, name] / dense.loc[seeds, name] for name in ("cost_seconds", "cost_flops"))
    return (f"Time of convaware over dense Inductor's (measured, interleaved): {Spread.of(seconds)}; "
            f"FLOPs promise {Spread.of(flops)} (counted).")  # fmt: skip


def targets(looks: pd.DataFrame, rows: pd.DataFrame) -> Iterator[str]:
    """Time to what dense reaches on the mean, less one standard error: FLOPs and seconds, medians over seeds."""
    for arm, (flops, seconds, missed, seeds) in to_target(looks, rows).items():
        yield (f"To dense's mean quality less one standard error, {arm}: median {flops:.3f} of a full dense run's "
               f"FLOPs, {seconds:.3f} of its seconds; missed by {missed} of {seeds} seeds.")  # fmt: skip


def missing_controls(rows: pd.DataFrame, looks: pd.DataFrame, task: str) -> Iterator[str]:
    """What the frontier of a task lacks, in words. rows: all there are; looks: of the task."""
    rates = [name for name, arm in DENSE.items() if arm.rate != 1.0]
    tried = (rows["task"] == task) & (rows["split"] == "valid") & rows["arm"].isin(rates)
    if not tried.any():
        yield "The dense runs have the task's own learning rate: none was chosen for them, which flatters convaware."
    if looks.empty:
        yield "The full dense run was not looked at along the way: none stopped early is on the frontier."


class Section(NamedTuple):
    """What there is to say of a task."""

    task: str
    title: str
    found: list[Found]
    said: list[str]
    provenance: str

    @property
    def lines(self) -> list[str]:
        """In Markdown."""
        said = [f"- {line}" for line in self.said]
        return [f"## {self.title}", "", table(self.found), "", *said, "", self.provenance, ""]


def sections(settings: Settings, tasks: Sequence[str], seeds: Sequence[int] | None = None) -> Iterator[Section]:
    """Of the tasks that have rows. seeds: None for all there are."""
    rows, all_looks = read(settings.rows), read_looks(settings.looks)
    for name in tasks:
        chosen, looks = rows_of(rows, settings, name, seeds), rows_of(all_looks, settings, name, seeds)
        if not (found := summarize(chosen, looks)):
            continue
        task = settings.task(name)
        said = [
            *missing_controls(rows, looks, name),
            *verdicts(task.goal, found),
            *filter(None, [times(chosen)]),
            *targets(looks, chosen),
        ]
        yield Section(name, f"{task.title}, {task.steps} steps", found, said, _provenance(chosen))


def show(settings: Settings, tasks: Sequence[str], seeds: Sequence[int] | None) -> Iterator[str]:
    """Of some tasks or seeds what `report` writes of all; gives what to tell, and writes nothing."""
    for section in sections(settings, tasks, seeds):
        yield from section.lines


def report(settings: Settings, tasks: Sequence[str]) -> Iterator[str]:
    """Write tables and plots of all rows there are; gives what to tell of these tasks."""
    every = list(sections(settings, list(TASKS)))
    if not every:
        return
    source = f"Written by `python -m benchmarks.quality`; measured on {settings.split} data."
    lines = ["# Quality against cost", "", source, "", PREAMBLE]
    for section in every:
        lines += section.lines
        yield from (f"{section.task}: {line}" for line in section.said if section.task in tasks)
    curves, skipped = f"{settings.report}.svg", f"{settings.report}_skipped.svg"
    titles = {section.task: settings.task(section.task).title for section in every}
    draw_curves(settings.out / curves, {section.task: section.found for section in every}, titles)
    lines += [f"![Quality against cost]({curves})", ""]
    shares = {
        section.task: [
            read_profile(file)
            for found in section.found
            if found.arm == "convaware"
            for seed in found.seeds
            if (file := settings.profile(section.task, seed)).exists()
        ]
        for section in every
    }
    if any(shares.values()):
        draw_profiles(settings.out / skipped, shares, titles)
        lines += [f"![Share of dW skipped]({skipped})", ""]
    (settings.out / f"{settings.report}.md").write_text("\n".join(lines))
    yield f"{settings.report}.md, {curves} and {skipped} are in {settings.out}/"


PREAMBLE = """\
Quality is minus the cross-entropy in nats; ± is one standard error over seeds. FLOPs are those of forward and backward
passes, counted. An arm's figure is the cost at which the frontier of all dense runs reaches its quality, over its own:
above 1 it beats them. Dense runs are shorter ones with their schedules shrunk and ones with smaller batches, each at
the best of three peak rates where these were tried (on validation data and other seeds), else at the task's own, and
the full run stopped early. The frontier joins the means of those that are better than all cheaper ones by straight
lines. ≥: better than every dense run, <: worse than the cheapest; neither is extrapolated. In seconds: for what took
turns with a full dense run, at that run's price of a FLOP. 95 %: bootstrap over seeds, 2,000 draws; with few seeds
that is hardly more than their range. Seed by seed: each against its own dense runs. In the plot bars are one standard
error, and the line is the frontier. Random and static skip what convaware skipped, in each step and in all. GradES and
CAC Gradient-Skip run in eager mode and are charged for what is still trainable.
"""


def _provenance(rows: pd.DataFrame) -> str:
    parts = [f"{name} {', '.join(sorted(set(rows[name].astype(str))))}" for name in ("torch", "cacompile", "device")]
    return f"Rows of {rows['date'].min()} to {rows['date'].max()}; {'; '.join(parts)}; one thread a run."
