"""The arms: dense runs of several lengths, convaware, controls that skip as much as it did, peers."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from importlib.util import find_spec

import numpy as np
from torch import nn

from benchmarks.quality.peers import CAC_OPTIONS, GRADES_OPTIONS, Grades, GradesToTheEnd, GradSkip, gradskip_sgd
from benchmarks.quality.run import Arm, Control, Run, trainable_flops
from benchmarks.quality.task import Task

LADDER = (95, 90, 85, 80, 75, 70, 60)
"""Lengths of the shorter dense runs, in % of the steps."""

BATCHES = (80, 60)
"""Sizes of the smaller batches, in %."""

RATES = (1.0, 1.5, 2.0)
"""Times the task's peak learning rate: every dense run has a right to the best of them, see `tuned`."""

DEV_SEED = 100
"""For choosing what has to be chosen; never reported."""

LENGTHS = {"dense": 1.0, **{f"dense-{percent}": percent / 100 for percent in LADDER}}
SHARES = {f"batch-{percent}": percent / 100 for percent in BATCHES}


def rated(rung: str, rate: float) -> str:
    """The arm that trains as `rung` at `rate` times the task's peak learning rate."""
    return rung if rate == 1.0 else f"{rung}x{rate:g}"


def _dense(rung: str, rate: float) -> Arm:
    title = f", {LENGTHS[rung]:.0%} of the steps" if LENGTHS.get(rung, 1.0) < 1.0 else ""
    title += f", {SHARES[rung]:.0%} of each batch" if rung in SHARES else ""
    title += f", {rate:g} times the rate" if rate != 1.0 else ""
    return Arm(
        name=rated(rung, rate), title=f"dense Inductor{title}", rate=rate, fraction=LENGTHS.get(rung, 1.0),
        batch=SHARES.get(rung, 1.0), looks=rung == "dense",
    )  # fmt: skip


DENSE = {arm.name: arm for rung in (*LENGTHS, *SHARES) for arm in (_dense(rung, rate) for rate in RATES)}
"""The dense arms, of which the frontier is made."""

CHOSEN = ("dense", "dense-80", "dense-70", "dense-60", "batch-80", "batch-60")
"""Those whose rate is chosen, and which are run at it, where nothing else is asked for."""


def random_groups(flops: np.ndarray, wanted: float, rng: np.random.Generator, tries: int = 1) -> np.ndarray:
    """bool [groups]: the first groups of a random order, as many as come nearest to `wanted` FLOPs.

    Of several orders tried, the nearest.
    """
    chosen, nearest = np.zeros(len(flops), bool), np.inf
    for _ in range(tries):
        order = rng.permutation(len(flops))
        off = np.abs(np.cumsum([0.0, *flops[order]]) - wanted)
        count = int(off.argmin())
        if off[count] < nearest:
            nearest = off[count]
            chosen = np.isin(np.arange(len(flops)), order[:count])
    return chosen


class _Drawn(Control):
    """Skips groups that are drawn without looking at them."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        if len(run.profile) != run.steps:
            raise ValueError(f"profile must have a share for each of {run.steps} steps, got {len(run.profile)}")
        self.rng = np.random.default_rng(run.seed)

    def skip(self, share: float, tries: int = 1) -> None:
        """Skips random groups with about this share of a step's dW FLOPs until told otherwise."""
        session = self.run.session
        index = session.index
        flops = index.sum(np.concatenate([state.flops for state in index.params]))
        step = session.flops[0] / self.run.step_number
        session.pin(mask=~random_groups(flops, share * step, self.rng, tries))


class RandomMask(_Drawn):
    """In each step another random set of groups, with the FLOPs that convaware skipped in it.

    What a step cannot give exactly, groups being whole, is made up for in the next.
    """

    def before_step(self) -> None:
        step, profile = self.run.step_number, self.run.profile
        if step:  # groups are known after the first
            owed = sum(profile[: step + 1]) - sum(self.run.skipped)
            self.skip(owed if profile[step] else 0.0)


class Static(_Drawn):
    """One random set of groups, off from the first step in which convaware skipped; as many FLOPs in all."""

    def before_step(self) -> None:
        profile = np.asarray(self.run.profile)
        start = max(1, int((profile > 0).argmax()))
        if self.run.step_number == start and profile.any():
            self.skip(min(1.0, profile.sum() / (self.run.steps - start)), tries=100)


LOWER = 1 / 3
"""Share of a step's FLOPs that is saved by what `Lower` freezes, about: forward passes and the upper part are left."""


class Lower(Control):
    """Freezes the lower part of the network from some step on, by hand: `requires_grad`, dX ends above it too."""

    start = 0.0
    """Share of the steps that train all of it."""

    def before_step(self) -> None:
        if self.run.step_number == round(self.start * self.run.steps):
            params = list(self.run.model.parameters())
            for param in params[: self._count(params)]:
                param.requires_grad_(False)
                param.grad = None

    def _count(self, params: Sequence[nn.Parameter]) -> int:
        """How many parameters, in the order of the modules, save LOWER of a step or just less."""
        run = self.run
        batch = next(run.task.batches(run.seed))
        full = trainable_flops(run.model, batch)
        trained = [param for param in params if param.requires_grad]

        def saves(count: int) -> float:
            lower = {id(param) for param in params[:count]}
            for param in trained:
                param.requires_grad_(id(param) not in lower)
            return 1.0 - trainable_flops(run.model, batch) / full

        count = bisect.bisect_right(range(len(params)), LOWER, key=saves) - 1
        saves(0)
        return count


class LowerLater(Lower):
    start = 0.5


ARMS = {
    arm.name: arm
    for arm in (
        *DENSE.values(),
        Arm(name="convaware", title="convaware, default options", backend="convaware", looks=True),
        Arm(
            name="tolerant", title="convaware, tolerance=0.2: four times the default", backend="convaware",
            options={"tolerance": 0.2},
        ),
        Arm(
            name="random", title="random groups, convaware's share in each step", backend="convaware",
            control=RandomMask, needs_profile=True,
        ),
        Arm(
            # the seed only draws masks that the pin replaces; one for all, so that all share what is compiled
            name="static", title="random groups frozen once, convaware's share in all", backend="convaware",
            options={"estimate": "zeros", "seed": 0}, control=Static, needs_profile=True,
        ),
        Arm(name="lower", title=f"lower part frozen that takes {LOWER:.0%} of a step", control=Lower),
        Arm(
            name="lower-later", title=f"lower part frozen that takes {LOWER:.0%} of a step, second half",
            control=LowerLater,
        ),
        Arm(
            name="grades", title="GradES 1.0.6", backend=None,  # every freeze would compile anew
            options=GRADES_OPTIONS, control=Grades, tasks=("gpt",), package="grades",
        ),
        Arm(
            name="grades-on", title="GradES 1.0.6 without its early stop", backend=None,
            options=GRADES_OPTIONS, control=GradesToTheEnd, tasks=("gpt",), package="grades",
        ),
        Arm(
            name="gradskip", title="CAC Gradient-Skip 1.0.0", backend=None,
            options=CAC_OPTIONS, control=GradSkip, optimizer=gradskip_sgd, tasks=("resnet",), package="cac",
        ),
    )
}  # fmt: skip


def applies(arm: Arm, task: Task) -> bool:
    """Whether the arm is meant for the task."""
    return not arm.tasks or task.name in arm.tasks


def installed(arm: Arm) -> bool:
    """Whether what the arm needs is there."""
    return not arm.package or find_spec(arm.package) is not None
