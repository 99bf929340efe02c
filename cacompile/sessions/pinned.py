"""The part of a session that holds masks fixed."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch

from cacompile.errors import ConvAwareError
from cacompile.state.params import ParamState
from cacompile.state.pins import Pin, next_pin

from .pinning import ModelPin, checked_seed, drawn, listed, named
from .view import ModelView


class Pinned(ModelView):
    """A model whose masks a user may hold."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self._pin: ModelPin | None = None
        self.pinned_at = 0
        """When `pin`, `unpin` or `load_state_dict` was last called, among those of all sessions; 0: never."""
        self._held: weakref.WeakSet[ParamState] = weakref.WeakSet()
        """Parameters that it has pinned, also such as have left the model."""

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
