"""What a user holds of one compiled model: its groups, this step's mask, saving and loading."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cacompile.config import Config
from cacompile.errors import ConvAwareError, unknown

from .instance import Instance, instances_of
from .saved import FORMAT, check_state
from .stepping import Scopes
from .tracked import Pin, Tracked, registry

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
        self._carried = (0.0, 0.0)

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
    def groups(self) -> list[str]:
        """Names of all groups, in the order of `mask`."""
        return [name for owner, record in self.tracked.items() for name in _group_names(owner, record)]

    @property
    def mask(self) -> torch.Tensor:
        """This step's mask, bool [groups] on the host; True: the gradient is computed."""
        return torch.from_numpy(self._joined("on", bool))

    @property
    def keep(self) -> torch.Tensor:
        """Probabilities of this step's draw, float64 [groups]."""
        return torch.from_numpy(self._joined("keep", float))

    @property
    def scores(self) -> torch.Tensor:
        """Expected descent of each group at the last reading, float64 [groups]; NaN before the first."""
        return torch.from_numpy(self._joined("score", float))

    def _joined(self, name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(getattr(r.state, name) for r in self.tracked.values())])

    @property
    def step_count(self) -> int:
        """Optimizer steps seen."""
        return max((record.step for record in self.tracked.values()), default=0)

    @property
    def flops(self) -> tuple[float, float]:
        """(all, saved): dW FLOPs that a dense run would have spent so far, and those left out."""
        total, saved = self._carried
        spent = {id(spent): spent for record in self.tracked.values() for spent in record.spent}.values()
        return total + sum(s.total for s in spent), saved + sum(s.saved for s in spent)

    def pin(
        self,
        mask: torch.Tensor | Sequence[bool] | Mapping[str, bool] | None = None,
        *,
        keep: float | None = None,
        seed: int = 0,
    ) -> None:
        """Hold the mask fixed until `unpin`, for experiments, benchmarks and debugging.

        Change pins between steps: what a pin skipped gets its estimate in the next step unless gradients are None.

        mask: bool for each of `groups`, or {group or parameter name: bool} with all others on; or
        keep, seed: draw it once, every group kept with probability `keep`.
        """
        tracked = self.tracked
        if (mask is None) == (keep is None):
            raise ConvAwareError("pin takes either mask or keep, got " + ("neither" if mask is None else "both"))
        if mask is None:
            pins: dict[str, Pin | None] = dict.fromkeys(tracked, _drawn(keep, seed))
        elif isinstance(mask, Mapping):
            pins = _named(mask, tracked)
        else:
            pins = _listed(mask, tracked)
        for name, record in tracked.items():
            record.pin = pins[name]
            record.apply_pin()

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
            "parameters": {name: record.to_dict() for name, record in tracked.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state exactly; checked whole before anything is changed.

        May be called before the first forward pass.
        """
        tracked = self.tracked
        check_state(state, tracked)
        for name, entry in state["parameters"].items():
            tracked[name].load(entry)
        self._carried = (0.0, 0.0)
        total, saved = self.flops
        self._carried = state["flops"][0] - total, state["flops"][1] - saved


def _group_names(owner: str, record: Tracked) -> list[str]:
    if record.partition is None:
        return []
    block, rows = record.partition.block, record.partition.rows
    return [f"{owner}[{start}:{min(start + block, rows)}]" for start in range(0, rows, block)]


def _drawn(keep: Any, seed: Any) -> Pin:
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0.0 <= keep <= 1.0:
        raise ConvAwareError(f"keep must be between 0 and 1, got {keep!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConvAwareError(f"seed must be an int >= 0, got {seed!r}")
    return Pin(keep=float(keep), seed=seed)


def _listed(mask: torch.Tensor | Sequence[bool], tracked: dict[str, Tracked]) -> dict[str, Pin | None]:
    if not isinstance(mask, (torch.Tensor, np.ndarray, Sequence)) or isinstance(mask, str):
        raise ConvAwareError(f"mask must be a sequence or a tensor of bool, or a dict, got {mask!r}")
    values = mask.reshape(-1).tolist() if isinstance(mask, (torch.Tensor, np.ndarray)) else list(mask)
    wanted = sum(record.groups for record in tracked.values())
    if len(values) != wanted:
        hint = "" if wanted else _TOO_EARLY
        raise ConvAwareError(f"mask must have one entry for each of the {wanted} groups{hint}, got {len(values)}")
    rest = iter(values)
    return {name: _given(next(rest) for _ in range(record.groups)) for name, record in tracked.items()}


def _named(mask: Mapping[str, bool], tracked: dict[str, Tracked]) -> dict[str, Pin | None]:
    names = {owner: _group_names(owner, record) for owner, record in tracked.items()}
    known = {*names, *(name for groups in names.values() for name in groups)}
    for name in mask:
        if name not in known:
            hint = "" if any(names.values()) else _TOO_EARLY
            raise unknown(f"group or parameter in mask{hint}:", name, known)
    # a parameter whose groups are not known yet can only be pinned as a whole
    return {
        owner: _given(mask.get(name, mask.get(owner, True)) for name in groups)
        or Pin(keep=float(mask.get(owner, True)))
        for owner, groups in names.items()
    }


def _given(values: Iterable[Any]) -> Pin | None:
    mask = tuple(map(bool, values))
    return Pin(mask=mask) if mask else None
