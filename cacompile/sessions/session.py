"""What a user holds of one compiled model: its groups, this step's mask, saving and loading."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.parameter import is_lazy

from cacompile.config import Config
from cacompile.controller.saved import saved_agreements
from cacompile.errors import ConvAwareError, renamed
from cacompile.hooks.steps import Controllers, follow_optimizers
from cacompile.state.binding import GraphBinding, bindings_of
from cacompile.state.groups import GroupIndex
from cacompile.state.history import History, collect, forget, most_points
from cacompile.state.losses import Losses
from cacompile.state.params import ParamState, registry
from cacompile.state.pins import Pin, attend, hold_pins, next_pin
from cacompile.state.resumed import Resumed
from cacompile.state.spent import Totals, add, spent_by
from cacompile.state.table import newest_structure
from cacompile.torch_internals import uncompiled

from .about import describe
from .checkpoint import FORMAT, checked
from .freezing import Freezing
from .pinning import ModelPin, Names, checked_seed, drawn, every_name, listed, named

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


def named_parameters(model: torch.nn.Module, **settings: bool) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """As the module has them, without what torch.compile adds to the names; settings: as the module's own.

    A lazy module's come once they have a shape.
    """
    for name, param in model.named_parameters(**settings):
        if is_lazy(param):
            continue
        yield name.replace("_orig_mod.", ""), param


@dataclass(slots=True)
class _Looked:
    """What was found of a model's parameters."""

    trained: list[tuple[str, torch.nn.Parameter]]
    """As the module has them, each once."""
    names: Names
    params: dict[str, ParamState] | None = None
    """Their states, once all are tracked."""


class Session(Freezing):
    """A view of the states of one model's parameters, under the names that they have in that model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._model = weakref.ref(model)
        self._pin: ModelPin | None = None
        self.pinned_at = 0
        """When `pin`, `unpin` or `load_state_dict` was last called, among those of all sessions; 0: never."""
        self._held: weakref.WeakSet[ParamState] = weakref.WeakSet()
        """Parameters that it has pinned, also such as have left the model."""
        self._looked: _Looked | None = None
        """While one call looks; see `looking`."""
        self._indexed: tuple[Any, GroupIndex] | None = None
        """The groups, and of which structure of which states they are."""
        self._called: tuple[Any, tuple[list[str], list[str]]] | None = None
        """Their names, and of which structure of states of which names."""
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
    def params(self) -> dict[str, ParamState]:
        """Parameter name -> its state, for the parameters of the model that are under our care, in its order."""
        if self._looked is not None and self._looked.params is not None:
            return self._looked.params
        found = ((name, registry.find(param)) for name, param in self._trained())
        return {name: state for name, state in found if state is not None}

    @property
    def bindings(self) -> list[GraphBinding]:
        """The compiled graphs, with these parameters, that have run so far."""
        return bindings_of(self.params.values())

    @property
    def config(self) -> Config | None:
        """The options that the model was compiled with; None before its first forward pass."""
        return next((param.config for param in self.params.values() if param.blocks), None)

    @property
    def index(self) -> GroupIndex:
        """The groups, and which blocks of which parameters they are."""
        params = [param for param in self.params.values() if param.blocks]
        key = newest_structure(), params
        if self._indexed is None or self._indexed[0] != key:
            self._indexed = key, GroupIndex(params)
        return self._indexed[1]

    @property
    def groups(self) -> list[str]:
        """Names of all groups, in the order of `mask`: `layers.3.mlp.neurons[0:128]`."""
        return self.names()[1]

    @property
    def families(self) -> list[str]:
        """Names of all families of groups: `layers.3.mlp.neurons`."""
        return self.names()[0]

    def names(self) -> tuple[list[str], list[str]]:
        """(families', groups') names."""
        called = list(self.params.items())
        key = newest_structure(), called
        if self._called is None or self._called[0] != key:
            self._called = key, self.index.names({id(param): name for name, param in called})
        families, groups = self._called[1]
        return list(families), list(groups)

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

        step: optimizer steps done; None: those that the session has seen. The callbacks of integrations call this.
        """
        self._losses.note(self.step_count if step is None else step, loss)

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
        live = self.bindings or (self.config is not None and not self._about)
        return describe(self, self._about) if live else dict(self._about)

    @property
    def began(self) -> float | None:
        """Clock, `time.time()`, when the first compiled graph ran in this process; None before."""
        started = [spent.started for spent in spent_by(self.params.values())]
        return time.time() - time.perf_counter() + min(started) if started else None

    @property
    def model(self) -> torch.nn.Module | None:
        """The model, while it lives."""
        return self._model()

    def pin(
        self,
        mask: torch.Tensor | Sequence[bool] | Mapping[str, bool] | None = None,
        *,
        keep: float | None = None,
        seed: int = 0,
    ) -> None:
        """Hold the mask fixed until `unpin`, for experiments, benchmarks and debugging.

        It holds for the model, and is saved with it: also for parameters that come later, as when a layer is unfrozen,
        put in or tied, or weights are loaded with `assign=True`. Of sessions that share a parameter the last one to pin
        or unpin decides. Change pins between steps: what a pin skipped gets its estimate in the next step unless
        gradients are None.

        mask: bool for each of `groups` (numbers are refused, they may be indices); or {name of a group, family or
        parameter: bool}, where the narrower name decides and a parameter's leaves the rest of its groups alone. Only
        what is named is held, also what comes later under one of these names or into one of these groups; with a bool
        for each group, what comes later is on; or
        keep, seed: draw it once, every group kept with probability `keep`, later ones as well.

        Each pin takes the place of the last one. Raises ConvAwareError for a name that there is not.
        """
        params = self._claim()
        if (mask is None) == (keep is None):
            raise ConvAwareError("pin takes either mask or keep, got " + ("neither" if mask is None else "both"))
        seed = checked_seed(seed)
        if mask is None:
            pin = drawn(keep, seed)
        elif isinstance(mask, Mapping):
            pin = named(mask, params, self._names)
        else:
            pin = listed(mask, params, self._names)
        self._decide(pin)

    def unpin(self) -> None:
        """End `pin`, for all: all groups are on until scores are read and a mask is drawn again."""
        self._claim()
        self._decide(None)

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

    @contextlib.contextmanager
    def looking(self) -> Iterator[None]:
        """Within it the model is looked through once, for nothing of the user's runs meanwhile."""
        before, model = self._looked, self._model()
        every = list(named_parameters(model, remove_duplicate=False)) if model is not None else []
        once = {id(param): (name, param) for name, param in reversed(every)}
        self._looked = _Looked(list(reversed(once.values())), every_name(every))
        try:
            yield
        finally:
            self._looked = before

    def _trained(self) -> Iterable[tuple[str, torch.nn.Parameter]]:
        if self._looked is not None:
            return self._looked.trained
        model = self._model()
        return named_parameters(model) if model is not None else ()

    @property
    def _names(self) -> Names:
        if self._looked is not None:
            return self._looked.names
        model = self._model()
        return every_name(named_parameters(model, remove_duplicate=False) if model is not None else ())

    def _claim(self) -> dict[str, ParamState]:
        """`params`, after all that the model trains now have come under our care, and under its pin."""
        for name, param in self._trained():
            if param.requires_grad:
                registry.track(param, name)
        if self._looked is not None:
            self._looked.params = self.params
        hold_pins()
        return self.params

    def _decide(self, pin: ModelPin | None) -> None:
        """Pin all parameters, and those that come later; None: let go of all."""
        params, held = self.params, set(self._held)
        self._change(pin, params)
        for param, own in self._pins(params):
            if own is None and pin is not None and param not in held:
                continue  # nothing was said of it, by nobody
            param.set_pin(own)
            self._note(param, parted=bool(param.blocks))

    def _change(self, pin: ModelPin | None, params: Mapping[str, ParamState]) -> None:
        """Another pin from now on; parameters that the last one held, and that have left the model, are let go."""
        for param in set(self._held) - set(params.values()):
            if param.pinned_at in (0, self.pinned_at):
                param.set_pin(None)
        self._pin, self.pinned_at = pin, next_pin(self)
        self._held.clear()

    def hold_pin(self) -> None:
        """Pin what has come since `pin`, or has blocks only since then; let go of what has come since `unpin`."""
        self._hold_frozen()
        params = self.params
        if all(param.pinned_at >= self.pinned_at for param in params.values()):
            return
        for param, own in self._pins(params):
            if param.pinned_at < self.pinned_at and (own is not None or self._pin is None):
                if param.pin != own:
                    param.set_pin(own)
                self._note(param, parted=bool(param.blocks))

    def _pins(self, params: Mapping[str, ParamState]) -> list[tuple[ParamState, Pin | None]]:
        pins = dict.fromkeys(params) if self._pin is None else self._pin.of(params, self._names)
        return [(param, pins[name]) for name, param in params.items()]

    def _note(self, param: ParamState, *, parted: bool) -> None:
        """A parameter is pinned, or let go, as this session says."""
        param.pinned_at = self.pinned_at if self._pin is None or self._pin.is_final(parted) else 0
        self._held.add(param)

    def report(self, path: str | os.PathLike[str] = "-", format: str | None = None) -> None:
        """Write what the run did, as `cacompile.report_state` does of a saved state; "-" prints it.

        path: `run.html`, `run.csv`, `run.txt`, a folder for TensorBoard, or "-". Raises ConvAwareError for any other
        that `format` (html, csv, terminal, tensorboard) does not explain.
        """
        importlib.import_module("cacompile").report_state(self.state_dict(), path, format)  # reports are above
