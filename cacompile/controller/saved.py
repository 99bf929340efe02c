"""Agreements in saved states: with names of parameters in place of their places in a model, and tensors for arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from cacompile.errors import ConvAwareError, shown
from cacompile.state.params import ParamState
from cacompile.state.replicas import Replicas

from .agreed import SHOWN, Agreed

TOLD = ("blocks", "flops", "scores", "parts")
"""What a rank tells of parameters, by place."""

_ARRAYS = {
    **dict.fromkeys(("of_block", "turn", "role", "age"), torch.int64),
    **dict.fromkeys(("keep", "phase"), torch.float64),
    **dict.fromkeys(("on", "readable"), torch.bool),
    "pinned": torch.int8,
}
_INTS = ("seed", "key", "warmup_steps", "max_age", "every")


def saved_agreements(params: Mapping[str, ParamState]) -> list[dict[str, Any]]:
    """What the ranks have agreed on for these parameters, as far as they are all that is agreed on with it."""
    names = {id(param): name for name, param in params.items()}
    found: list[dict[str, Any]] = []
    for replicas in dict.fromkeys(param.replicas for param in params.values() if param.replicas is not None):
        found += _of(replicas, names)
    return found


def _of(replicas: Replicas, names: Mapping[int, str]) -> list[dict[str, Any]]:
    found = []
    for agreement in sorted(replicas.agreements, key=lambda agreement: agreement.members[0].place):
        if all(id(param) in names for param in agreement.members) and (saved := agreement.save()) is not None:
            called = {param.place: names[id(param)] for param in agreement.members}
            found.append({**_renamed(saved, called), "members": list(called.values())})
    return found


def _renamed(saved: Mapping[str, Any], called: Mapping[Any, Any]) -> dict[str, Any]:
    """With other keys for the parameters, and tensors for arrays or the other way round."""
    said, told = saved["said"], saved["told"]
    return {
        "every": saved["every"],
        "parts": [_part(part, called) for part in saved["parts"]],
        "said": None if said is None else [_part(part, called) for part in said],
        "told": None if told is None else [{what: _keyed(of[what], called) for what in TOLD} for of in told],
        "shards": _keyed(saved["shards"], called),
    }


def _part(part: Mapping[str, Any], called: Mapping[Any, Any]) -> dict[str, Any]:
    return {**_plain(part), "places": [called[place] for place in part["places"]]}


def _keyed(values: Mapping[Any, Any], called: Mapping[Any, Any]) -> dict[Any, Any]:
    return {called[place]: _plain(value) for place, value in values.items() if place in called}


def _plain(value: Any) -> Any:
    """Arrays as tensors, and tensors as arrays."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, torch.Tensor):
        return value.numpy().copy()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def resumed(saved: Mapping[str, Any], places: Mapping[str, int]) -> dict[str, Any]:
    """What `Agreement.save` gave. places: of parameters, by the names that they have in the state."""
    return _renamed(saved, places)


def check_saved(agreements: Any) -> None:
    """Raise a ConvAwareError unless it is a list of `saved_agreements`."""
    _must(isinstance(agreements, list), agreements)
    for saved in agreements:
        _keys(saved, {"every", "parts", "said", "told", "shards", "members"})
        names = saved["members"]
        _must(isinstance(names, list) and all(isinstance(name, str) for name in names), names)
        _must(type(saved["every"]) is int and saved["every"] >= 1, saved["every"])
        for parts in (saved["parts"], saved["said"] or []):
            _must(isinstance(parts, list), parts)
            for part in parts:
                _check_part(part, names)
        told = saved["told"] or []
        _must(isinstance(told, list), told)
        for known in told:
            _keys(known, set(TOLD))
        for values in (saved["shards"], *(known[what] for known in told for what in TOLD)):
            _must(isinstance(values, Mapping) and set(values) <= set(names), values)


def _check_part(part: Any, names: list[str]) -> None:
    _keys(part, {field.name for field in fields(Agreed)})
    places, blocks, shown = part["places"], part["blocks"], part["shown"]
    _must(isinstance(places, list) and set(places) <= set(names), places)
    _must(isinstance(blocks, list) and all(type(each) is int and each > 0 for each in blocks), blocks)
    _must(len(blocks) == len(places), blocks)
    for name in _INTS:
        _must(type(part[name]) is int and part[name] >= 0, part[name])
    groups = len(part["turn"]) if isinstance(part["turn"], torch.Tensor) else 0
    for name, dtype in _ARRAYS.items():
        _check_array(part[name], dtype, groups if name in ("turn", "role") else sum(blocks))
    _must(bool(((part["of_block"] >= 0) & (part["of_block"] < groups)).all()), part["of_block"])
    _keys(shown, set(SHOWN))
    for name in SHOWN:
        _check_array(shown[name], torch.float64, sum(blocks))


def _check_array(value: Any, dtype: torch.dtype, size: int) -> None:
    _must(isinstance(value, torch.Tensor) and (value.dtype, tuple(value.shape)) == (dtype, (size,)), value)


def _keys(value: Any, wanted: set[str]) -> None:
    _must(isinstance(value, Mapping) and set(value) == wanted, value)


def _must(ok: bool, value: object) -> None:
    if not ok:
        raise ConvAwareError(
            f"state_dict entry agreements must be as Session.state_dict() gives it, got {shown(value)} in it"
        )
