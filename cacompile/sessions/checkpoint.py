"""A saved state, checked whole before anything takes it over."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from cacompile.config import LARGEST_SEED
from cacompile.controller.saved import check_saved
from cacompile.errors import ConvAwareError, shown, unknown
from cacompile.layout import Partition
from cacompile.state.history import BY_GROUP, BY_STEP, History
from cacompile.state.params import ParamState
from cacompile.state.table import COLUMNS, SAVED

from .formats import FORMAT, format_of, upgraded
from .pinning import ModelPin

ENTRY = "state_dict entry "

LARGEST = 2**62
"""Of counts: what has been counted, and some more, is to fit into int64."""

COUNT = f"an int >= 0 and <= {LARGEST}"


KEYS = {"format", "flops", "step_flops", "forward_flops", "backwards", "groups", "history", "losses", "about", "pin"}
KEYS |= {"agreements", "parameters"}

VALUES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "keep": (lambda x: (x >= 0) & (x <= 1), "between 0 and 1"),
    "phase": (lambda x: (x == -1) | ((x >= 0) & (x <= 1)), "between 0 and 1, or -1"),
    "score": (lambda x: ~x.isinf(), "finite or NaN"),
    "mean_descent": (lambda x: ~x.isinf(), "finite or NaN"),
    "update_ratio": (lambda x: ~(x < 0), ">= 0 or NaN"),
    "descent": (lambda x: ~x.isinf(), "finite or NaN"),
    "frozen": (lambda x: (x >= -1) & (x <= LARGEST), f"from -1 to {LARGEST}"),
    "age": (lambda x: (x >= 0) & (x <= LARGEST), f"from 0 to {LARGEST}"),
}
"""What the saved columns of a parameter's blocks may hold."""


def checked(state: Any, params: Mapping[str, ParamState]) -> Mapping[str, Any]:
    """A copy of the state in the format of this version, of which nothing can fail later, whatever becomes of its own.

    Raises a ConvAwareError that names what is wrong, its value and what is allowed.
    """
    state = checked_run(state, params)
    saved = state["parameters"]
    for name, entry in saved.items():
        _keys(entry, params[name].to_dict().keys(), f"{ENTRY}{name!r}")
        _check_entry(name, entry, params[name])
    if missing := [name for name in params if name not in saved]:
        raise ConvAwareError(f"state_dict lacks {len(missing)} of the model's parameters, first {missing[0]!r}")
    return _copied(state)


def checked_run(state: Any, params: Collection[str] | None = None) -> Mapping[str, Any]:
    """The state in the format of this version, checked as far as it goes without the model; else as `checked`.

    params: the model's, where it is known.
    """
    state = upgraded(state)
    found = format_of(state)
    if not isinstance(found, int) or found != FORMAT:
        raise ConvAwareError(f"state_dict must be one of Session.state_dict() with format {FORMAT}, got {shown(found)}")
    _keys(state, KEYS, "state_dict")
    flops, groups, saved, counts = (state[key] for key in ("flops", "groups", "parameters", "backwards"))
    _must(_is_row(groups) and all(isinstance(g, str) for g in groups), "groups", groups, "a list of names")
    ok = _is_row(flops) and len(flops) == 2 and all(_is_number(each) and each >= 0 for each in flops)
    _must(ok, "flops", flops, "two finite numbers >= 0")
    step = state["step_flops"]
    _must(_is_number(step) and step >= 0, "step_flops", step, "a finite number >= 0")
    ok = _is_row(counts) and len(counts) == 2 and all(map(_is_count, counts))
    _must(ok, "backwards", counts, f"two ints >= 0 and <= {LARGEST}")
    forward = state["forward_flops"]
    ok = forward is None or (_is_number(forward) and forward >= 0)
    _must(ok, "forward_flops", forward, "a finite number >= 0, or None")
    _check_losses(state["losses"])
    _check_about(state["about"])
    check_history(state["history"])
    _check_model_pin(state["pin"])
    check_saved(state["agreements"])
    _must(isinstance(saved, Mapping), "parameters", saved, "a mapping of names to entries")
    for name, entry in saved.items():
        _must(isinstance(name, str), "parameters", name, "a mapping of names to entries")
        if params is not None and name not in params:
            raise unknown("parameter in state_dict:", name, params)
        where = f"{ENTRY}{name!r}"
        _keys(entry, {"step", "pin"}, where, others=True)
        _must(_is_count(entry["step"]), f"{name!r}: step", entry["step"], COUNT)
    return state


def _check_about(about: Any) -> None:
    """Of `describe`, or empty."""

    def must(ok: bool, field: str, value: Any, allowed: str) -> None:
        _must(ok, f"about: {field}", value, allowed)

    _must(isinstance(about, Mapping), "about", about, "a mapping")
    if not about:
        return
    _keys(about, {"options", "versions", "run", "why", "graphs", "parameters"}, f"{ENTRY}about")
    _keys(about["why"], {"weights", "nothing", "families"}, f"{ENTRY}about: why")
    families = about["why"]["families"]
    must(isinstance(families, Mapping), "why['families']", families, "a mapping of names")
    texts = {**about["why"], **{f"families[{name!r}]": reason for name, reason in families.items()}}
    for name, value in texts.items():
        must(name == "families" or isinstance(value, str), f"why: {name}", value, "a str")
    for field in ("options", "versions", "run", "parameters"):
        ok = isinstance(about[field], Mapping) and all(isinstance(name, str) for name in about[field])
        must(ok, field, about[field], "a mapping of names")
    for name, value in about["options"].items():
        must(isinstance(value, str) or _is_number(value), f"options[{name!r}]", value, "a number or a str")
    for field in ("versions", "run"):
        for name, value in about[field].items():
            must(isinstance(value, str), f"{field}[{name!r}]", value, "a str")
    must(_is_count(about["graphs"]), "graphs", about["graphs"], COUNT)
    for name, value in about["parameters"].items():
        where = f"parameters[{name!r}]"
        _keys(value, {"flops", "reason"}, f"{ENTRY}about: {where}")
        must(_is_number(value["flops"]) and value["flops"] >= 0, f"{where}: flops", value["flops"], "a number >= 0")
        must(isinstance(value["reason"], str), f"{where}: reason", value["reason"], "a str")


def _check_losses(losses: Any) -> None:
    """Of `Losses.to_dict()`."""
    _keys(losses, {"step", "loss"}, f"{ENTRY}losses")
    step, loss = losses["step"], losses["loss"]
    ok = isinstance(step, torch.Tensor) and step.dim() == 1 and _is_array(step, torch.int64, tuple(step.shape))
    _must(ok and bool((step.diff() > 0).all()), "losses: step", step, "int64 [losses], rising, on the host")
    _must(_is_array(loss, torch.float64, tuple(step.shape)), "losses: loss", loss, f"float64 {list(step.shape)}")


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
    must(bool((step.diff() > 0).all() and (step >= 0).all()), "step", step.tolist(), "rising from 0 or more")
    must(bool((step <= LARGEST).all()), "step", step.tolist(), f"up to {LARGEST}")
    for field in ("seconds", "total", "saved", "backwards", "masked", "skipped", "flops"):
        values = history[field]
        must(bool((values.isfinite() & (values >= 0)).all()), field, values.tolist(), "finite and >= 0")
    whole = history["step_flops"]
    must(bool((whole.isnan() | (whole.isfinite() & (whole >= 0))).all()), "step_flops", whole.tolist(), ">= 0 or NaN")
    keep = history["keep"]
    must(bool((keep.isnan() | ((keep >= 0) & (keep <= 1))).all()), "keep", keep.tolist(), "between 0 and 1 or NaN")
    family, stride = history["family"], history["stride"]
    must(bool(((family >= 0) & (family < families)).all()), "family", family.tolist(), f"from 0 to {families - 1}")
    must(_is_count(stride) and stride > 0, "stride", stride, f"an int >= 1 and <= {LARGEST}")


def _check_entry(name: str, entry: Mapping[str, Any], param: ParamState) -> None:
    def must(ok: bool, field: str, value: Any, allowed: str) -> None:
        _must(ok, f"{name!r}: {field}", value, allowed)

    shape, key, pin = entry["shape"], entry["key"], entry["pin"]
    must(_is_row(shape) and all(map(_is_count, shape)), "shape", shape, "a tuple of sizes")
    if tuple(shape) != param.shape:
        raise ConvAwareError(f"{ENTRY}{name!r} is for shape {tuple(shape)}, the model's parameter has {param.shape}")
    must(key is None or _is_count(key), "key", key, f"{COUNT}, or None")
    ok = entry["frozen"] is None or _is_count(entry["frozen"])
    must(ok, "frozen", entry["frozen"], f"{COUNT}, or None")
    shard = entry["shard"]
    ok = shard is None or (_is_row(shard) and len(shard) == 3 and all(map(_is_count, shard)))
    must(ok, "shard", shard, "(dim, start, stop) or None")
    since = entry["counted_from"]
    must(_is_count(since) and since <= entry["step"], "counted_from", since, f"{COUNT}, and no later than step")
    blocks = _check_partition(entry["partition"], param.shape, must)
    must(_is_array(entry["skipped"], torch.bool, blocks), "skipped", entry["skipped"], f"bool [{blocks}] on the host")
    counted = entry["counted"]
    ok = _is_array(counted, torch.int64, blocks) and bool(((counted >= 0) & (counted <= LARGEST)).all())
    must(ok, "counted", counted, f"int64 [{blocks}] >= 0 and <= {LARGEST} on the host")
    step, allowed = entry["step_counted"], "a whole number >= 0"
    must(isinstance(step, int) and not isinstance(step, bool) and step >= 0, "step_counted", step, allowed)
    _keys(entry["blocks"], set(SAVED), f"{ENTRY}{name!r}: blocks")
    for field in SAVED:
        dtype = torch.from_numpy(np.empty(0, COLUMNS[field].dtype)).dtype
        array, allowed = entry["blocks"][field], f"{str(dtype).removeprefix('torch.')} [{blocks}] on the host"
        must(_is_array(array, dtype, blocks), f"blocks[{field!r}]", array, allowed)
    for field, (right, allowed) in VALUES.items():
        array = entry["blocks"][field]
        must(bool(right(array).all()), f"blocks[{field!r}]", array.tolist(), allowed)
    _check_pin(pin, blocks, must)
    if (norm_shares := entry["norm_shares"]) is not None:
        _keys(norm_shares, {"order", "values", "known"}, f"{ENTRY}{name!r}: norm_shares")
        order = norm_shares["order"]
        must(isinstance(order, float) and order > 0.0, "norm_shares['order']", order, "a float > 0")
        for field, dtype in (("values", torch.float32), ("known", torch.bool)):
            allowed = f"{str(dtype).removeprefix('torch.')} [{blocks}] on the host"
            must(_is_array(norm_shares[field], dtype, blocks), f"norm_shares[{field!r}]", norm_shares[field], allowed)
        shares = norm_shares["values"]
        must(not bool((shares < 0).any()), "norm_shares['values']", shares.tolist(), ">= 0 or NaN")
    if (in_flight := entry["in_flight"]) is not None:
        _keys(in_flight, {"values", "sampled"}, f"{ENTRY}{name!r}: in_flight")
        values, sampled = in_flight["values"], in_flight["sampled"]
        rows = 2 if entry["shard"] is None else 3
        ok = any(_is_array(values, dtype, (rows, blocks)) for dtype in (torch.float64, torch.float32))
        must(ok, "in_flight['values']", values, f"floats [{rows}, {blocks}] on the host")
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
    of_bools = _is_row(mask) and all(on is None or isinstance(on, bool) for on in mask)
    must(mask is None or (of_bools and len(mask) == blocks), "pin's mask", mask, f"{blocks} bools and Nones, or None")
    must(_is_number(keep) and 0.0 <= keep <= 1.0, "pin's keep", keep, "between 0 and 1")
    must(_is_seed(seed), "pin's seed", seed, f"an int from 0 to {LARGEST_SEED}")


def _check_model_pin(pin: Any) -> None:
    if pin is None:
        return
    _keys(pin, {field.name for field in fields(ModelPin)}, f"{ENTRY}pin")
    keep, seed, blocks, params = pin["keep"], pin["seed"], pin["blocks"], pin["params"]
    ok = keep is None or (_is_number(keep) and 0.0 <= keep <= 1.0)
    _must(ok, "pin: keep", keep, "between 0 and 1, or None")
    _must(_is_seed(seed), "pin: seed", seed, f"an int from 0 to {LARGEST_SEED}")
    _must(isinstance(pin["rest"], bool), "pin: rest", pin["rest"], "a bool")
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
        got = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
    else:
        got = shown(value)
    raise ConvAwareError(f"{ENTRY}{what} must be {allowed}, got {got}")


def _keys(value: Any, wanted: Collection[str], where: str, *, others: bool = False) -> None:
    """others: whether there may be other keys."""
    if not isinstance(value, Mapping):
        raise ConvAwareError(f"{where} must be a mapping, got {type(value).__name__}")
    if lost := set(wanted) - value.keys():
        raise ConvAwareError(f"{where} lacks {', '.join(sorted(lost))}")
    if not others and (more := [key for key in value if key not in wanted]):
        raise unknown(f"key of {where}:", more[0], wanted)


def _copied(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copied(each) for key, each in value.items()}
    if isinstance(value, list):
        return list(map(_copied, value))
    return value.clone() if isinstance(value, torch.Tensor) else value


def _is_row(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_SEED


def _is_array(value: Any, dtype: torch.dtype, shape: int | tuple[int, ...]) -> bool:
    """Whether it can be taken over as values of this shape; an int: one value a block."""
    return (
        isinstance(value, torch.Tensor)
        and (value.device.type, value.layout) == ("cpu", torch.strided)
        and (value.dtype, tuple(value.shape)) == (dtype, shape if isinstance(shape, tuple) else (shape,))
        and not value.requires_grad
    )
