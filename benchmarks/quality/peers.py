"""Peers, what others freeze by, as arms: GradES (matrices) and CAC Gradient-Skip (leading convolutions).

Both set `requires_grad` to False for good, run here in eager mode, and are charged for what is still trainable only.
"""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import files
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

from benchmarks.quality.run import Arm, Control, Run, train
from benchmarks.quality.task import Task

TAU = 1.856
"""Median over the matrices of `gpt` of their L1 change in a step, at 70 % of a dense run from seed 100.

It would have skipped 27 % of that run's dW (`python -m benchmarks.quality tau`), about as much as convaware did.
"""

GRADES_OPTIONS = {"tau": TAU, "compute_interval": 1}

CAC_OPTIONS = {"CAC_VAR_START_ITR": 5_000 / 30_000, "CAC_VAR_SAMPLES": 200 / 30_000}
"""As shares of the steps. CAC's defaults, 5,000 and 200 steps, are for long runs; 30,000 is how we read that."""


class Grades(Control):
    """GradES' callback without transformers' Trainer; the run ends when it says so."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        from grades import GradEarlyStoppingCallback, GradEarlyStoppingConfig

        self.callback = GradEarlyStoppingCallback(GradEarlyStoppingConfig(**run.arm.options))
        self.state = SimpleNamespace(max_steps=run.steps, global_step=0)
        self.asked = SimpleNamespace(should_training_stop=False)
        self.args = SimpleNamespace(output_dir=None)
        self.callback.on_train_begin(self.args, self.state, self.asked, model=run.model.inner)
        if not self.callback.initialized:
            raise RuntimeError("GradES has found no matrix to follow")

    def after_step(self) -> None:
        self.state.global_step = self.run.step_number
        self.callback.on_step_end(self.args, self.state, self.asked, model=self.run.model.inner)
        self.run.stopped = self.asked.should_training_stop


class GradesToTheEnd(Grades):
    """GradES whose wish to end the run is not heard: stopping early is what a shorter dense run could do too."""

    def after_step(self) -> None:
        super().after_step()
        self.run.stopped = False


def weight_changes(task: Task, seed: int, steps: int) -> dict[str, tuple[int, list[float]]]:
    """Matrix that GradES follows -> (its weights, its L1 change in each step of a dense run)."""
    never = {**GRADES_OPTIONS, "tau": 1e-12, "alpha": 0.99}
    run = Run(task, Arm(name="watch", title="", backend=None, options=never, control=Grades), seed, steps=steps)
    train([run])
    stats = run.control.callback.component_stats
    return {name: (each.param_count, [change for _, change in each.change_history]) for name, each in stats.items()}


class GradSkip(Control):
    """Lets CAC's optimizer read its options, which it takes from the environment in its first step."""

    def before_step(self) -> None:
        if self.run.step_number == 0:
            self.before = dict(os.environ)
            for name, share in self.run.arm.options.items():
                os.environ[name] = str(max(1, round(share * self.run.steps)))

    def after_step(self) -> None:
        if self.run.step_number == 1:
            for name in self.run.arm.options:
                del os.environ[name]
            os.environ.update(self.before)


def gradskip_sgd(task: Task, model: nn.Module) -> torch.optim.Optimizer:
    """CAC's SGD with the rate, momentum and decay of the task's own."""
    usual = task.optimizer(model).defaults
    options = {name: usual[name] for name in ("lr", "momentum", "weight_decay")}
    return _cac_sgd().SGD(list(model.parameters()), **options)


def _cac_sgd() -> ModuleType:
    # importing the package itself needs apex
    path = next(file.locate() for file in files("cac") or [] if file.name == "cac_sgd.py")
    spec = importlib.util.spec_from_file_location("cac_sgd", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
