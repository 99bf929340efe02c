"""What a user holds of one compiled model: its groups, this step's mask, saving and loading."""

from __future__ import annotations

import importlib
import math
import os
import time
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cacompile.controller.saved import saved_agreements
from cacompile.errors import ConvAwareError, renamed
from cacompile.hooks.steps import Controllers, follow_optimizers
from cacompile.state.history import History, collect, forget, most_points
from cacompile.state.losses import Losses
from cacompile.state.pins import attend, hold_pins
from cacompile.state.registry import registry
from cacompile.state.resumed import Resumed
from cacompile.state.spent import Totals, add, spent_by
from cacompile.torch_internals import uncompiled

from .about import describe
from .checkpoint import FORMAT, checked, names_parameter
from .freezing import Freezing
from .pinning import ModelPin
from .values import checked_loss, checked_step

_RENAMED = {"instances": "bindings", "tracked": "params", "units": "index"}
_sessions: weakref.WeakKeyDictionary[torch.nn.Module, Session] = weakref.WeakKeyDictionary()


def session(model: torch.nn.Module) -> Session:
    """The session of a compiled model, or of any part of one; the same object every time.

    May be called before the first forward pass: pins and loaded states wait until the groups are known.
    """
    if not isinstance(model, torch.nn.Module):
        raise ConvAwareError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = uncompiled(model)
    if model not in _sessions:
        _sessions[model] = Session(model)
    return _sessions[model]


class Session(Freezing):
    """A view of the states of one model's parameters, under the names that they have in that model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self._claim()
        self._controllers = Controllers()
        self._carried = Totals()
        self._began: float | None = None
        self._past = History.empty()
        self._loaded_groups: list[str] = []
        self._about: dict[str, Any] = {}
        self.judged: tuple[Any, np.ndarray] | None = None
        """For `why`: what the policy last said of each block's group, and after which decisions."""
        self._losses = Losses()

    @property
    def mask(self) -> torch.Tensor:
        """This step's mask, bool [groups] on the host; True: the gradient is computed."""
        index = self.index
        return torch.from_numpy(index.every(index.column("on")))

    @property
    def keep(self) -> torch.Tensor:
        """Probabilities of this step's draw, float64 [groups]."""
        index = self.index
        return torch.from_numpy(index.least(index.column("keep")))

    @property
    def scores(self) -> torch.Tensor:
        """Expected descent of each group at the last measurement, float64 [groups]; NaN before the first."""
        index = self.index
        return torch.from_numpy(index.sum(index.column("score")))

    @property
    def flops(self) -> tuple[float, float]:
        """(all, saved): dW FLOPs that a dense run would have spent so far, and those left out."""
        return self._totals[:2]

    @property
    def backwards(self) -> tuple[int, int]:
        """(all, masked): backward passes of compiled graphs so far; those not masked ran Inductor's own version."""
        return self._totals[2:4]

    @property
    def step_flops(self) -> float:
        """FLOPs that a dense run's forward and backward passes would have spent so far: forward, dX and dW."""
        return self._totals.step

    @property
    def forward_flops(self) -> float:
        """Those of them that forward passes took; NaN after loading a state before format 8, which lacks them."""
        return self._totals.forward

    def note_loss(self, loss: float, step: int | None = None) -> None:
        """Keep a loss for the report, and the saved state: at most 512 of a run, thinned evenly.

        loss: a number, or a tensor of one, which is waited for; it may be infinite or NaN.
        step: optimizer steps done; None: those that the session has seen. The callbacks of integrations call this.
        """
        self._losses.note(self.step_count if step is None else checked_step(step), checked_loss(loss))

    @property
    def losses(self) -> tuple[np.ndarray, np.ndarray]:
        """(int64 [losses] optimizer steps done, float64 [losses]), of `note_loss`."""
        return self._losses.steps, self._losses.values

    @property
    def _totals(self) -> Totals:
        return add(self._carried, Totals.of(self.params.values()))

    @property
    def history(self) -> History:
        """What the run did, measurement by measurement; what came before a loaded state is part of it."""
        index = self.index
        if not index.params:
            return self._past
        live = collect(index, self.names(), self._carried, self._began)
        every, limit = index.params[0].config.monitor_every, most_points(len(index.of_block))
        return self._past.then(live, every=every, limit=limit)

    @property
    def about(self) -> dict[str, Any]:
        """Of the compiled model: options, versions, and why which parameters stay dense; empty before it has run.

        As it was when last asked for, once the compiled graphs are gone.
        """
        live = self.ran or (self.config is not None and not self._about)
        return describe(self, self._about) if live else dict(self._about)

    @property
    def began(self) -> float | None:
        """Clock, `time.time()`, when the first compiled graph ran in this process; None before."""
        started = [spent.started for spent in spent_by(self.params.values())]
        return time.time() - time.perf_counter() + min(started) if started else None

    def step(self) -> None:
        """Draw the next mask; only for optimizers that are not `torch.optim.Optimizer`s: those do it themselves."""
        for controller in self._controllers.of([param.param for param in self.params.values()]):
            controller.advance(None)
        self._controllers.agree(None)

    def state_dict(self) -> dict[str, Any]:
        """All that later masks depend on, for `torch.save`; names are those of the model's parameters."""
        params, self._about = self._claim(), self.about
        return {
            "format": FORMAT,
            "flops": self.flops,
            "step_flops": self.step_flops,
            "forward_flops": None if math.isnan(self.forward_flops) else self.forward_flops,
            "losses": self._losses.to_dict(),
            "backwards": self.backwards,
            "groups": self.groups or self._loaded_groups,
            "history": self.history.to_dict(),
            "about": self.about,
            "pin": None if self._pin is None else self._pin.to_dict(),
            "agreements": saved_agreements(params),
            "parameters": {name: param.to_dict() for name, param in params.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state exactly; checked whole before anything is changed.

        May be called before the first forward pass.
        """
        for name, param in self.trained():
            if names_parameter(state, name):  # which may not be trained any more
                registry.track(param, name)
        params = self._claim()
        state = checked(state, params)
        follow_optimizers()  # the first step may begin before the first forward pass
        self._change(None if state["pin"] is None else ModelPin(**state["pin"]), params)
        agreed = Resumed.by_name(state["agreements"], params)
        for name, param in params.items():
            param.resumed = agreed.get(name)
        for name, entry in state["parameters"].items():
            self._note(params[name], parted=entry["partition"] is not None)
            params[name].load(entry)
        self._note_frozen()
        attend(self)
        hold_pins()
        forget(list(params.values()))
        self._past = History.of(state["history"])
        self._began = time.perf_counter() - self._past.seconds[-1:].sum()
        self._losses, self.judged = Losses.of(state["losses"]), None
        self._loaded_groups, self._about = list(state["groups"]), dict(state["about"])
        self._carried = Totals()
        (total, saved), (backwards, masked) = state["flops"], state["backwards"]
        forward = math.nan if state["forward_flops"] is None else state["forward_flops"]
        loaded = Totals(total, saved, backwards, masked, state["step_flops"], forward)
        self._carried = add(loaded, self._totals, -1)

    def __getattr__(self, name: str) -> Any:
        if name not in _RENAMED:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        renamed(f"Session.{name}", f"Session.{_RENAMED[name]}")
        return getattr(self, _RENAMED[name])

    def report(self, path: str | os.PathLike[str] = "-", format: str | None = None) -> None:
        """Write what the run did, as `cacompile.report_state` does of a saved state; "-" prints it.

        path: `run.html`, `run.csv`, `run.txt`, a folder for TensorBoard, or "-". Raises ConvAwareError for any other
        that `format` (html, csv, terminal, tensorboard) does not explain.
        """
        importlib.import_module("cacompile").report_state(self.state_dict(), path, format)  # reports are above
