"""What a user holds of one compiled model: its groups, this step's mask, saving and loading."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cacompile.config import Config
from cacompile.errors import ConvAwareError, unknown

from .describe import describe
from .history import History, Totals, add, collect, forget, most_points
from .instance import Instance, instances_of
from .saved import FORMAT, check_state
from .stepping import Scopes, follow_optimizers
from .tracked import Pin, Tracked, registry
from .units import Units

_TOO_EARLY = " (groups are known after the first forward pass)"
_sessions: weakref.WeakKeyDictionary[torch.nn.Module, Session] = weakref.WeakKeyDictionary()


def session(model: torch.nn.Module) -> Session:
    """The session of a compiled model, or of any part of one; the same object every time.

    May be called before the first forward pass: pins and loaded states wait until the groups are known.
    """
    if not isinstance(model, torch.nn.Module):
        raise ConvAwareError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    model = getattr(model, "_orig_mod", model)
    if model not in _sessions:
        _sessions[model] = Session(model)
    return _sessions[model]


def named_parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """As the module has them, without what torch.compile adds to the names."""
    for name, param in model.named_parameters():
        yield name.replace("_orig_mod.", ""), param


class Session:
    """A view of the records of one model's parameters, under the names they have in that model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._scopes = Scopes()
        self._carried = Totals()
        self._began: float | None = None
        self._past = History.empty()
        self._loaded_groups: list[str] = []
        self._about: dict[str, Any] = {}

    @property
    def tracked(self) -> dict[str, Tracked]:
        """Parameter name -> record, for the trainable parameters the model has now, in its order."""
        model = self._model()
        named = named_parameters(model) if model is not None else ()
        return {
            name: registry.track(param, name)
            for name, param in named
            if param.requires_grad or registry.find(param) is not None
        }

    @property
    def instances(self) -> list[Instance]:
        """The compiled graphs, with these parameters, that have run so far."""
        return instances_of(self.tracked.values())

    @property
    def config(self) -> Config | None:
        """The options that the model was compiled with; None before its first forward pass."""
        return next((record.config for record in self.tracked.values() if record.groups), None)

    @property
    def units(self) -> Units:
        """The groups, and which blocks of which parameters they are."""
        return Units([record for record in self.tracked.values() if record.groups])

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
        return self.units.names({id(record): name for name, record in self.tracked.items()})

    @property
    def mask(self) -> torch.Tensor:
        """This step's mask, bool [groups] on the host; True: the gradient is computed."""
        units = self.units
        return torch.from_numpy(units.every(_joined(units, "on", bool)))

    @property
    def keep(self) -> torch.Tensor:
        """Probabilities of this step's draw, float64 [groups]."""
        units = self.units
        return torch.from_numpy(units.least(_joined(units, "keep", float)))

    @property
    def scores(self) -> torch.Tensor:
        """Expected descent of each group at the last reading, float64 [groups]; NaN before the first."""
        units = self.units
        return torch.from_numpy(units.sum(_joined(units, "score", float)))

    @property
    def step_count(self) -> int:
        """Optimizer steps seen."""
        return max((record.step for record in self.tracked.values()), default=0)

    @property
    def flops(self) -> tuple[float, float]:
        """(all, saved): dW FLOPs that a dense run would have spent so far, and those left out."""
        return self._totals[:2]

    @property
    def backwards(self) -> tuple[int, int]:
        """(all, guarded): backward passes of compiled graphs so far; those not guarded ran Inductor's own version."""
        return self._totals[2:]

    @property
    def _totals(self) -> Totals:
        return add(self._carried, Totals.of(list(self.tracked.values())))

    @property
    def history(self) -> History:
        """What the run did, reading by reading; what came before a loaded state is part of it."""
        units = self.units
        if not units.records:
            return self._past
        live = collect(units, self.names(), self._carried, self._began)
        every, limit = units.records[0].config.monitor_every, most_points(len(units.of_block))
        return self._past.then(live, every=every, limit=limit)

    @property
    def about(self) -> dict[str, Any]:
        """Of the compiled model: options, versions, and why which parameters stay dense; empty before it has run.

        As it was when last asked for, once the compiled graphs are gone.
        """
        if self.instances or (self.config is not None and not self._about):
            self._about = describe(self)
        return dict(self._about)

    def pin(
        self,
        mask: torch.Tensor | Sequence[bool] | Mapping[str, bool] | None = None,
        *,
        keep: float | None = None,
        seed: int = 0,
    ) -> None:
        """Hold the mask fixed until `unpin`, for experiments, benchmarks and debugging.

        Change pins between steps: what a pin skipped gets its estimate in the next step unless gradients are None.

        mask: bool for each of `groups`; or {name of a group, family or parameter: bool} with all others on, where the
        narrower name decides and a parameter's leaves the rest of its groups on; or
        keep, seed: draw it once, every group kept with probability `keep`.
        """
        tracked = self.tracked
        if (mask is None) == (keep is None):
            raise ConvAwareError("pin takes either mask or keep, got " + ("neither" if mask is None else "both"))
        if mask is None:
            pins: dict[str, Pin | None] = dict.fromkeys(tracked, _drawn(keep, seed))
        elif isinstance(mask, Mapping):
            pins = self._named(mask)
        else:
            pins = self._listed(mask)
        for name, record in tracked.items():
            record.pin = pins[name]
            record.apply_pin()

    def _listed(self, mask: torch.Tensor | Sequence[bool]) -> dict[str, Pin | None]:
        if not isinstance(mask, (torch.Tensor, np.ndarray, Sequence)) or isinstance(mask, str):
            raise ConvAwareError(f"mask must be a sequence or a tensor of bool, or a dict, got {mask!r}")
        values = mask.reshape(-1).tolist() if isinstance(mask, (torch.Tensor, np.ndarray)) else list(mask)
        units = self.units
        if len(values) != len(units.all):
            hint = "" if units.all else _TOO_EARLY
            wanted = f"one entry for each of the {len(units.all)} groups{hint}"
            raise ConvAwareError(f"mask must have {wanted}, got {len(values)}")
        split = units.split(np.array(values, bool))
        pins = {id(record): Pin(mask=tuple(map(bool, each))) for record, each in zip(units.records, split)}
        return {name: pins.get(id(record)) for name, record in self.tracked.items()}

    def _named(self, mask: Mapping[str, bool]) -> dict[str, Pin | None]:
        units, tracked = self.units, self.tracked
        families, groups = self.names()
        known = {*tracked, *families, *groups}
        for name in mask:
            if name not in known:
                hint = "" if groups else _TOO_EARLY
                raise unknown(f"group, family or parameter in mask{hint}:", name, known)
        chosen = [mask.get(name, mask.get(families[f])) for name, f in zip(groups, units.family)]
        pins: dict[int, Pin] = {}
        for record, name in ((r, n) for n, r in tracked.items()):
            otherwise = bool(mask.get(name, True))
            # a parameter whose groups are not known yet can only be pinned as a whole
            pins[id(record)] = Pin(keep=float(otherwise))
        split = units.split(np.arange(len(groups)))
        for record, each in zip(units.records, split):
            otherwise = bool(pins[id(record)].keep)
            pins[id(record)] = Pin(mask=tuple(otherwise if chosen[i] is None else bool(chosen[i]) for i in each))
        return {name: pins[id(record)] for name, record in tracked.items()}

    def unpin(self) -> None:
        """End `pin`: all groups are on until scores are read and a mask is drawn again."""
        for record in self.tracked.values():
            record.pin = None
            record.apply_pin()

    def step(self) -> None:
        """Draw the next mask; only for optimizers that are not `torch.optim.Optimizer`s: those do it themselves."""
        for scope in self._scopes.of([record.ref() for record in self.tracked.values()]):
            scope.advance(None)

    def state_dict(self) -> dict[str, Any]:
        """All that later masks depend on, for `torch.save`; names are those of the model's parameters."""
        tracked = self.tracked
        return {
            "format": FORMAT,
            "flops": self.flops,
            "backwards": self.backwards,
            "groups": self.groups or self._loaded_groups,
            "history": self.history.to_dict(),
            "about": self.about,
            "parameters": {name: record.to_dict() for name, record in tracked.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state exactly; checked whole before anything is changed.

        May be called before the first forward pass.
        """
        tracked = self.tracked
        check_state(state, tracked)
        follow_optimizers()  # the first step may begin before the first forward pass
        for name, entry in state["parameters"].items():
            tracked[name].load(entry)
        forget(list(tracked.values()))
        self._past = History.of(state["history"])
        self._began = time.perf_counter() - self._past.seconds[-1:].sum()
        self._loaded_groups, self._about = list(state["groups"]), dict(state["about"])
        self._carried = Totals()
        self._carried = add(Totals(*state["flops"], *state["backwards"]), self._totals, -1)

    def report(self, path: str | os.PathLike[str] = "-", format: str | None = None) -> None:
        """Write what the run did, as `cacompile.report_state` does of a saved state; "-" prints it.

        path: `run.html`, `run.csv`, `run.txt`, a folder for TensorBoard, or "-". Raises ConvAwareError for any other
        that `format` (html, csv, terminal, tensorboard) does not explain.
        """
        import cacompile  # its public names are found when they are asked for: here is below the reports

        cacompile.report_state(self.state_dict(), path, format)


def _joined(units: Units, name: str, dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(getattr(record.state, name) for record in units.records)])


def _drawn(keep: Any, seed: Any) -> Pin:
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0.0 <= keep <= 1.0:
        raise ConvAwareError(f"keep must be between 0 and 1, got {keep!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConvAwareError(f"seed must be an int >= 0, got {seed!r}")
    return Pin(keep=float(keep), seed=seed)
