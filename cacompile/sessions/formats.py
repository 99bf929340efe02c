"""Formats of saved states: how those of earlier versions are read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMAT = 5
"""Format of the states that this version saves."""

_ENTRY_4 = {"awaited": "in_flight", "shares": "norm_shares", "groups": "blocks"}
_COLUMNS_4 = {"due": "phase", "usual": "mean_descent", "speed": "update_ratio"}
_HISTORY_4 = {"guarded": "masked", "speed": "update_ratio"}


def upgraded(state: Any) -> Any:
    """The same state in the format of this version; as it is where it has another format, or is no state at all."""
    if not isinstance(state, Mapping) or state.get("format") != 4:
        return state
    entries = state.get("parameters")
    if isinstance(entries, Mapping):
        entries = {name: _entry(entry) for name, entry in entries.items()}
    return {**state, "format": FORMAT, "history": _renamed(state.get("history"), _HISTORY_4), "parameters": entries}


def _entry(entry: Any) -> Any:
    entry = _renamed(entry, _ENTRY_4)
    if not isinstance(entry, Mapping) or "blocks" not in entry:
        return entry
    return {**entry, "blocks": _renamed(entry["blocks"], _COLUMNS_4)}


def _renamed(values: Any, names: Mapping[str, str]) -> Any:
    return {names.get(k, k): v for k, v in values.items()} if isinstance(values, Mapping) else values
