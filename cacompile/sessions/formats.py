"""Formats of saved states: how those of earlier versions are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

FORMAT = 6
"""Format of the states that this version saves."""

_ENTRY_4 = {"awaited": "in_flight", "shares": "norm_shares", "groups": "blocks"}
_COLUMNS_4 = {"due": "phase", "usual": "mean_descent", "speed": "update_ratio"}
_HISTORY_4 = {"guarded": "masked", "speed": "update_ratio"}


def upgraded(state: Any) -> Any:
    """The same state in the format of this version; as it is where it has another format, or is no state at all."""
    if isinstance(state, Mapping) and state.get("format") == 4:
        history = _renamed(state.get("history"), _HISTORY_4)
        state = {**state, "format": 5, "history": history, "parameters": _each(state, _entry_of_4)}
    if isinstance(state, Mapping) and state.get("format") == 5:
        state = {**state, "format": 6, "parameters": _each(state, _entry_of_5)}
    return state


def _each(state: Mapping[str, Any], upgrade: Callable[[Any], Any]) -> Any:
    entries = state.get("parameters")
    return {name: upgrade(entry) for name, entry in entries.items()} if isinstance(entries, Mapping) else entries


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
