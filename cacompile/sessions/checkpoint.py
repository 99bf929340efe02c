"""A saved state, checked whole before anything takes it over."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from cacompile.errors import ConvAwareError, unknown
from cacompile.layout import Partition
from cacompile.state.history import BY_GROUP, BY_STEP, History
from cacompile.state.params import ParamState
from cacompile.state.table import COLUMNS, SAVED

from .formats import FORMAT, upgraded
from .pinning import ModelPin

ENTRY = "state_dict entry "


def checked(state: Any, params: Mapping[str, ParamState]) -> Mapping[str, Any]:
    """The state in the format of this version, of which nothing can fail later.

    Raises a ConvAwareError that names what is wrong, its value and what is allowed.
    """
    state = upgraded(state)
    if not isinstance(state, Mapping) or state.get("format") != FORMAT:
        got = state.get("format") if isinstance(state, Mapping) else type(state).__name__
        raise ConvAwareError(f"state_dict must be one of Session.state_dict() with format {FORMAT}, got {got!r}")
    _keys(state, {"flops", "backwards", "groups", "history", "about", "pin", "parameters"}, "state_dict")
    flops, groups, saved = state["flops"], state["groups"], state["parameters"]
    _must(_is_row(groups) and all(isinstance(g, str) for g in groups), "groups", groups, "a list of names")
    _must(_is_row(flops) and len(flops) == 2 and all(map(_is_number, flops)), "flops", flops, "two finite numbers")
    counts = state["backwards"]
    _must(_is_row(counts) and len(counts) == 2 and all(map(_is_count, counts)), "backwards", counts, "two ints >= 0")
    _must(isinstance(state["about"], Mapping), "about", state["about"], "a mapping")
    check_history(state["history"])
    _must(isinstance(saved, Mapping), "parameters", saved, "a mapping of names to entries")
    for name, entry in saved.items():
        if name not in params:
            raise unknown("parameter in state_dict:", name, params)
        _keys(entry, params[name].to_dict().keys(), f"{ENTRY}{name!r}")
        _check_entry(name, entry, params[name])
    _check_model_pin(state["pin"])
    if missing := [name for name in params if name not in saved]:
        raise ConvAwareError(f"state_dict lacks {len(missing)} of the model's parameters, first {missing[0]!r}")
    return state


def check_history(history: Any) -> None:
    """Raise a ConvAwareError unless it is of `History.to_dict()`."""
    like = History.empty().to_dict()
    _keys(history, like.keys(), f"{ENTRY}history")

    def must(ok: bool, field: str, value: Any, allowed: str) -> None:
        _must(ok, f"history: {field}", value, allowed)

    for field in ("groups", "families", "kinds"):
        names = history[field]
        must(_is_row(names) and all(isinstance(name, str) for name in names), field, names, "a list of names")
    families, step = len(history["families"]), history["step"]
    must(len(history["kinds"]) == families, "kinds", history["kinds"], f"{families} names")
    must(isinstance(step, torch.Tensor) and step.dim() == 1, "step", step, "int64 [measurements] on the host")
    sizes = dict.fromkeys(BY_STEP, step.shape) | dict.fromkeys(BY_GROUP, (*step.shape, len(history["groups"])))
    for field, tensor in like.items():
        if isinstance(tensor, torch.Tensor):
            shape = tuple(sizes.get(field, (len(history["groups"]),)))
            allowed = f"{str(tensor.dtype).removeprefix('torch.')} {list(shape)} on the host"
            must(_is_array(history[field], tensor.dtype, shape), field, history[field], allowed)
    must(bool((step.diff() > 0).all()), "step", step.tolist(), "rising")
    family, stride = history["family"], history["stride"]
    must(bool(((family >= 0) & (family < families)).all()), "family", family.tolist(), f"from 0 to {families - 1}")
    must(_is_count(stride) and stride > 0, "stride", stride, "an int >= 1")


def _check_entry(name: str, entry: Mapping[str, Any], param: ParamState) -> None:
    def must(ok: bool, field: str, value: Any, allowed: str) -> None:
        _must(ok, f"{name!r}: {field}", value, allowed)

    shape, key, step, pin = entry["shape"], entry["key"], entry["step"], entry["pin"]
    must(_is_row(shape) and all(map(_is_count, shape)), "shape", shape, "a tuple of sizes")
    if tuple(shape) != param.shape:
        raise ConvAwareError(f"{ENTRY}{name!r} is for shape {tuple(shape)}, the model's parameter has {param.shape}")
    must(key is None or _is_count(key), "key", key, "an int >= 0 or None")
    must(_is_count(step), "step", step, "an int >= 0")
    blocks = _check_partition(entry["partition"], param.shape, must)
    must(_is_array(entry["skipped"], torch.bool, blocks), "skipped", entry["skipped"], f"bool [{blocks}] on the host")
    _keys(entry["blocks"], set(SAVED), f"{ENTRY}{name!r}: blocks")
    for field in SAVED:
        dtype = torch.from_numpy(np.empty(0, COLUMNS[field].dtype)).dtype
        array, allowed = entry["blocks"][field], f"{str(dtype).removeprefix('torch.')} [{blocks}] on the host"
        must(_is_array(array, dtype, blocks), f"blocks[{field!r}]", array, allowed)
    keep = entry["blocks"]["keep"]
    must(bool(((keep >= 0) & (keep <= 1)).all()), "blocks['keep']", keep.tolist(), "between 0 and 1")
    _check_pin(pin, blocks, must)
    if (norm_shares := entry["norm_shares"]) is not None:
        _keys(norm_shares, {"order", "values", "known"}, f"{ENTRY}{name!r}: norm_shares")
        must(isinstance(norm_shares["order"], float), "norm_shares['order']", norm_shares["order"], "a float")
        for field, dtype in (("values", torch.float32), ("known", torch.bool)):
            allowed = f"{str(dtype).removeprefix('torch.')} [{blocks}] on the host"
            must(_is_array(norm_shares[field], dtype, blocks), f"norm_shares[{field!r}]", norm_shares[field], allowed)
    if (in_flight := entry["in_flight"]) is not None:
        _keys(in_flight, {"values", "sampled"}, f"{ENTRY}{name!r}: in_flight")
        values, sampled = in_flight["values"], in_flight["sampled"]
        ok = isinstance(values, torch.Tensor) and values.is_floating_point() and values.dim() == 2
        ok = ok and len(values) == 2 and all(_is_array(each, values.dtype, blocks) for each in values)
        must(ok, "in_flight['values']", values, f"floats [2, {blocks}] on the host")
        ok = sampled is None or _is_array(sampled, torch.bool, blocks)
        must(ok, "in_flight['sampled']", sampled, f"bool [{blocks}] on the host or None")


def _check_partition(partition: Any, shape: tuple[int, ...], must: Callable[..., None]) -> int:
    """The number of blocks that it makes."""
    if partition is None:
        return 0
    ok = _is_row(partition) and len(partition) == 3 and all(map(_is_count, partition))
    must(ok, "partition", partition, "(dim, block, rows) or None")
    dim, block, rows = partition
    ok = dim < len(shape) and block >= 1 and rows == shape[dim]
    must(ok, "partition", partition, f"(dim, block >= 1, rows) of a parameter of shape {shape}")
    return Partition(dim, block, rows).blocks


def _check_pin(pin: Any, blocks: int, must: Callable[..., None]) -> None:
    if pin is None:
        return
    must(_is_row(pin) and len(pin) == 3, "pin", pin, "(mask, keep, seed) or None")
    mask, keep, seed = pin
    ok = mask is None or (_is_row(mask) and len(mask) == blocks and all(isinstance(on, bool) for on in mask))
    must(ok, "pin's mask", mask, f"{blocks} bools or None")
    must(_is_number(keep) and 0.0 <= keep <= 1.0, "pin's keep", keep, "between 0 and 1")
    must(_is_count(seed), "pin's seed", seed, "an int >= 0")


def _check_model_pin(pin: Any) -> None:
    if pin is None:
        return
    _keys(pin, {field.name for field in fields(ModelPin)}, f"{ENTRY}pin")
    keep, seed, blocks, params = pin["keep"], pin["seed"], pin["blocks"], pin["params"]
    ok = keep is None or (_is_number(keep) and 0.0 <= keep <= 1.0)
    _must(ok, "pin: keep", keep, "between 0 and 1, or None")
    _must(_is_count(seed), "pin: seed", seed, "an int >= 0")
    for what, said in (("blocks", blocks), ("params", params)):
        _must(isinstance(said, Mapping), f"pin: {what}", said, "a mapping of parameters' names")
        _must(all(isinstance(name, str) for name in said), f"pin: {what}", list(said), "names of parameters")
    for name, row in blocks.items():
        ok = _is_row(row) and all(on is None or isinstance(on, bool) for on in row)
        _must(ok, f"pin: blocks[{name!r}]", row, "a tuple of bools and Nones")
    for name, on in params.items():
        _must(isinstance(on, bool), f"pin: params[{name!r}]", on, "a bool")


def _must(ok: bool, what: str, value: Any, allowed: str) -> None:
    if ok:
        return
    if isinstance(value, torch.Tensor):
        value = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    raise ConvAwareError(f"{ENTRY}{what} must be {allowed}, got {value!r}")


def _keys(value: Any, wanted: Any, where: str) -> None:
    if not isinstance(value, Mapping):
        raise ConvAwareError(f"{where} must be a mapping, got {type(value).__name__}")
    if lost := set(wanted) - value.keys():
        raise ConvAwareError(f"{where} lacks {', '.join(sorted(lost))}")


def _is_row(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_array(value: Any, dtype: torch.dtype, shape: int | tuple[int, ...]) -> bool:
    """Whether it can be taken over as values of this shape; an int: one value a block."""
    return (
        isinstance(value, torch.Tensor)
        and (value.device.type, value.layout) == ("cpu", torch.strided)
        and (value.dtype, tuple(value.shape)) == (dtype, shape if isinstance(shape, tuple) else (shape,))
        and not value.requires_grad
    )
