"""Whole training loops with half the groups skipped, against eager ones in which estimates are put in by hand."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import compile_all, masks, mlp, pin_mixed
from torch import Tensor, nn, optim
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import cacompile

STEPS, DENSE = 8, 2
"""Steps of a run, and how many of them before anything is skipped."""


@dataclass(frozen=True)
class Loop:
    """How somebody trains."""

    kind: str = "AdamW"
    made: str = "first"
    """When the optimizer is made: before the model is compiled, after, or when groups are skipped already."""
    micro_batches: int = 1
    scaler: bool = False
    clip: float | None = None
    reload: bool = False
    """The optimizer's state goes back to an earlier one mid-run."""
    compiled_step: bool = False

    def optimizer(self, model: nn.Module) -> optim.Optimizer:
        """Two groups with learning rates and weight decays of their own."""
        first, *rest = model.children()
        groups = [
            {"params": list(first.parameters()), "lr": 3e-3, "weight_decay": 0.1},
            {"params": [p for module in rest for p in module.parameters()], "lr": 1e-2},
        ]
        if self.kind == "AdamW":
            return optim.AdamW(groups, eps=1e-3)
        if self.kind == "RMSprop":
            return optim.RMSprop(groups, momentum=0.9, eps=1e-2)
        return optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=self.kind == "nesterov")


LOOPS = {
    "plain": Loop(),
    "made after compiling": Loop(made="compiled"),
    "made when groups are skipped": Loop(made="late", kind="SGD"),
    "2 micro-batches": Loop(micro_batches=2, kind="nesterov"),
    "4 micro-batches, clipped": Loop(micro_batches=4, clip=0.02),
    "scaler": Loop(scaler=True, kind="SGD"),
    "scaler, unscaled and clipped": Loop(scaler=True, clip=0.02),
    "RMSprop": Loop(kind="RMSprop"),
    "state loaded": Loop(reload=True),
    "compiled step": Loop(compiled_step=True),
}


class Run:
    """Somebody's training, which does not know whose gradients it is given."""

    def __init__(self, loop: Loop, model: nn.Module) -> None:
        self.loop, self.model, self.call = loop, model, model
        self.optimizer = self.scaler = self.saved = None
        self.norms: list[Tensor] = []
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))

    def make_optimizer(self) -> None:
        self.optimizer = self.loop.optimizer(self.model)
        self.step = self.optimizer.step
        if self.loop.scaler:
            self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)

    def train(self, i: int, batch: Tensor) -> None:
        loop, scaler = self.loop, self.scaler
        if i == DENSE + 1 and loop.reload:
            self.saved = copy.deepcopy(self.optimizer.state_dict())
        if i == DENSE + 3 and loop.reload:
            self.optimizer.load_state_dict(self.saved)
        for micro in batch.chunk(loop.micro_batches):
            loss = self.call(micro).square().mean() / loop.micro_batches
            (scaler.scale(loss) if scaler else loss).backward()
        if self.optimizer is None:
            self.model.zero_grad()
            return
        if loop.clip is not None:
            if scaler:
                scaler.unscale_(self.optimizer)
            self.clip(loop.clip)
        if scaler:
            scaler.step(self.optimizer)
            scaler.update()
        else:
            self.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.model)

    def clip(self, limit: float) -> None:
        self.norms.append(nn.utils.clip_grad_norm_(self.model.parameters(), limit))


class Ours(Run):
    def make_optimizer(self) -> None:
        super().make_optimizer()
        if self.loop.compiled_step:
            self.step = torch.compile(self.optimizer.step)


class ByHand(Run):
    """Eager, on a copy that nobody tracks. off: of each parameter, by name, the dimension and rows to put in."""

    def __init__(self, loop: Loop, model: nn.Module) -> None:
        super().__init__(loop, model)
        self.off: dict[str, tuple[int, Tensor]] = {}

    def make_optimizer(self) -> None:
        super().make_optimizer()
        self.optimizer.register_step_pre_hook(lambda *_: self.fill())

    def clip(self, limit: float) -> None:
        """By the norm of the other run: how good that is has tests of its own."""
        for param in self.model.parameters():
            param.grad *= limit / (float(self.norms[-1]) + 1e-6)

    def fill(self) -> None:
        settings = {id(param): group for group in self.optimizer.param_groups for param in group["params"]}
        for name, param in self.model.named_parameters():
            if name in self.off:
                dim, off = self.off[name]
                guess = self.estimate(self.optimizer.state.get(param), settings[id(param)], param.detach())
                param.grad.movedim(dim, 0)[off] = guess.movedim(dim, 0)[off]

    def estimate(self, state: Any, settings: Any, param: Tensor) -> Tensor:
        if state is None:
            return torch.zeros_like(param)
        if self.loop.kind == "AdamW":
            return state["exp_avg"]
        mean = 0.1 * state["momentum_buffer"]
        if self.loop.kind == "RMSprop":
            mean *= state["square_avg"].sqrt() + settings["eps"]
        return mean - settings["weight_decay"] * param


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_a_loop_trains_as_written_by_hand(loop: Loop):
    model = mlp()
    ours, by_hand = Ours(loop, model), ByHand(loop, copy.deepcopy(model))
    start = copy.deepcopy(model.state_dict())

    def make_optimizers(when: str) -> None:
        if loop.made == when:
            ours.make_optimizer()
            by_hand.make_optimizer()

    make_optimizers("first")
    ours.call = compile_all(model, "convaware")
    make_optimizers("compiled")
    for i, batch in enumerate(torch.randn(STEPS, 16, 32)):
        if i == DENSE:
            pin_mixed(cacompile.session(model))
            by_hand.off = {name: (dim, ~on) for name, (dim, on) in masks(model).items()}
            make_optimizers("late")
        ours.train(i, batch)
        by_hand.norms = ours.norms
        by_hand.train(i, batch)
    total, saved = cacompile.session(model).flops
    assert 0 < saved < total
    assert loop.clip is None or min(ours.norms) > loop.clip, "or nothing is clipped"
    for one, other in ((ours.model, by_hand.model), (ours.average, by_hand.average)):
        expected = other.state_dict()
        for name, value in one.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert all((start[name] != value).any() for name, value in model.state_dict().items())
