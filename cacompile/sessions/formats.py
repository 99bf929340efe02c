"""Formats of saved states: how those of earlier versions are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from cacompile.state.losses import Losses

FORMAT = 8
"""Format of the states that this version saves."""

OLDEST = 4
"""The first format that is still read."""

_ENTRY_4 = {"awaited": "in_flight", "shares": "norm_shares", "groups": "blocks"}
_COLUMNS_4 = {"due": "phase", "usual": "mean_descent", "speed": "update_ratio"}
_HISTORY_4 = {"guarded": "masked", "speed": "update_ratio"}


def format_of(state: Any) -> Any:
    """A number; of what is no state at all, what it has or is instead."""
    return state.get("format") if isinstance(state, Mapping) else type(state).__name__


def _is(state: Any, number: int) -> bool:
    return isinstance(found := format_of(state), int) and found == number


def upgraded(state: Any) -> Any:
    """The same state in the format of this version; as it is where it has another format, or is no state at all."""
    if _is(state, 4):
        history = _renamed(state.get("history"), _HISTORY_4)
        state = {**state, "format": 5, "history": history, "parameters": _each(state, _entry_of_4)}
    if _is(state, 5):
        pin, entries = _model_pin(state.get("parameters")), _each(state, _entry_of_5)
        state = {**state, "format": 6, "pin": pin, "parameters": entries}
    if _is(state, 6):
        # forward pass, dX and dW were taken to cost the same
        flops = state.get("flops")
        step = (
            3.0 * flops[0] if isinstance(flops, (tuple, list)) and flops and isinstance(flops[0], (int, float)) else 0.0
        )
        state = {**state, "format": 7, "step_flops": step, "parameters": _each(state, _entry_of_6)}
    if _is(state, 7):
        state = _of_7(state)
    return state


def _of_7(state: Mapping[str, Any]) -> dict[str, Any]:
    """Forward passes were not counted, no loss was kept, nobody said why; and a named pin held all others on."""
    pin, about, history = state.get("pin"), state.get("about"), state.get("history")
    if isinstance(pin, Mapping):
        pin = {"rest": True, **pin}
    if isinstance(about, Mapping) and about:
        about = {"run": {}, "why": {"weights": "", "nothing": "", "families": {}}, **about}
    if isinstance(history, Mapping) and isinstance(history.get("total"), torch.Tensor):
        history = {"step_flops": _filled(history["total"], torch.nan), **history}
    return {
        "forward_flops": None,
        "losses": Losses.nothing(),
        "agreements": [],
        **state,
        "format": FORMAT,
        "pin": pin,
        "about": about,
        "history": history,
        "parameters": _each(state, _entry_of_7),
    }


def _filled(like: torch.Tensor, value: float) -> torch.Tensor:
    """A column of one value, float64 or int64 as the value is: of what the saved one is, which is checked later, it has
    the shape alone."""
    return torch.full(like.shape, value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _each(state: Mapping[str, Any], upgrade: Callable[[Any], Any]) -> Any:
    entries = state.get("parameters")
    return {name: upgrade(entry) for name, entry in entries.items()} if isinstance(entries, Mapping) else entries


def _model_pin(entries: Any) -> dict[str, Any] | None:
    """What `Session.pin` was given, as far as the pins of single parameters tell; None: not the whole model was pinned.

    Nothing is refused here: the entries are checked afterwards.
    """
    if not isinstance(entries, Mapping) or not all(isinstance(entry, Mapping) for entry in entries.values()):
        return None
    if any(entry.get("pin") is None and entry.get("partition") is not None for entry in entries.values()):
        return None
    pins = {name: entry["pin"] for name, entry in entries.items() if entry.get("pin") is not None}
    if not pins or not all(map(_is_pin, pins.values())):
        return None
    (mask, keep, seed), *others = pins.values()
    if mask is None and all(pin == (mask, keep, seed) for pin in map(tuple, others)):
        return {"keep": keep, "seed": seed, "blocks": {}, "params": {}}
    whole = {name: pin[1] for name, pin in pins.items() if pin[0] is None}
    if not all(keep in (0.0, 1.0) for keep in whole.values()):
        return None
    blocks = {name: pin[0] for name, pin in pins.items() if pin[0] is not None}
    return {"keep": None, "seed": 0, "blocks": blocks, "params": {name: bool(keep) for name, keep in whole.items()}}


def _is_pin(pin: Any) -> bool:
    """Whether its parts are of types that can be compared."""
    kinds: tuple[Any, ...] = ((tuple, list, type(None)), (int, float), int)
    return isinstance(pin, (tuple, list)) and len(pin) == 3 and all(isinstance(*pair) for pair in zip(pin, kinds))


def _entry_of_7(entry: Any) -> Any:
    """Descents of last time were not kept; FLOPs of whole steps not counted for each parameter: forward pass, dX and dW
    are taken to cost the same."""
    blocks, counted = (entry.get(name) if isinstance(entry, Mapping) else None for name in ("blocks", "counted"))
    if isinstance(blocks, Mapping) and isinstance(blocks.get("score"), torch.Tensor):
        entry = {**entry, "blocks": {"descent": _filled(blocks["score"], torch.nan), **blocks}}
    if isinstance(counted, torch.Tensor) and counted.dtype == torch.int64 and not counted.is_meta:
        entry = {"step_counted": 3 * int(counted.sum()), **entry}
    return {"shard": None, **entry} if isinstance(entry, Mapping) else entry


def _entry_of_6(entry: Any) -> Any:
    """Nothing could be frozen."""
    blocks = entry.get("blocks") if isinstance(entry, Mapping) else None
    if not isinstance(blocks, Mapping) or not isinstance(blocks.get("age"), torch.Tensor):
        return entry
    return {**entry, "frozen": None, "blocks": {**blocks, "frozen": _filled(blocks["age"], -1)}}


def _entry_of_5(entry: Any) -> Any:
    """FLOPs were not counted for each block: counting begins."""
    if not isinstance(entry, Mapping) or not isinstance(entry.get("skipped"), torch.Tensor):
        return entry
    return {
        **entry,
        "counted": torch.zeros(entry["skipped"].shape, dtype=torch.int64),
        "counted_from": entry.get("step"),
    }


def _entry_of_4(entry: Any) -> Any:
    entry = _renamed(entry, _ENTRY_4)
    if not isinstance(entry, Mapping) or "blocks" not in entry:
        return entry
    return {**entry, "blocks": _renamed(entry["blocks"], _COLUMNS_4)}


def _renamed(values: Any, names: Mapping[str, str]) -> Any:
    return {names.get(k, k): v for k, v in values.items()} if isinstance(values, Mapping) else values
