"""A saved state, checked whole before anything takes it over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
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

from .formats import FORMAT, OLDEST, format_of, upgraded
from .pinning import ModelPin
from .values import (
    COUNT,
    ENTRY,
    LARGEST,
    Demand,
    copied,
    demand,
    demand_of,
    is_array,
    is_count,
    is_number,
    is_row,
    is_seed,
    keys,
)

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


def names_parameter(state: Any, name: str) -> bool:
    """Whether something that may be a state, and of any format, has an entry of this parameter."""
    saved = state.get("parameters") if isinstance(state, Mapping) else None
    return isinstance(saved, Mapping) and name in saved


def checked(state: Any, params: Mapping[str, ParamState]) -> Mapping[str, Any]:
    """A copy of the state in the format of this version, of which nothing can fail later, whatever becomes of its own.

    Raises a ConvAwareError that names what is wrong, its value and what is allowed.
    """
    state = checked_run(state, params)
    saved = state["parameters"]
    for name, entry in saved.items():
        keys(entry, params[name].to_dict().keys(), f"{ENTRY}{name!r}")
        _check_entry(name, entry, params[name])
    trained = (name for name, param in params.items() if param.param is not None and param.param.requires_grad)
    if missing := [name for name in trained if name not in saved]:
        raise ConvAwareError(f"state_dict lacks {len(missing)} of the model's parameters, first {missing[0]!r}")
    return copied(state)


def checked_run(state: Any, params: Collection[str] | None = None) -> Mapping[str, Any]:
    """The state in the format of this version, checked as far as it goes without the model; else as `checked`.

    params: the model's, where it is known.
    """
    state = upgraded(state)
    found = format_of(state)
    if not isinstance(found, int) or found != FORMAT:
        what = type(state).__name__ if not isinstance(state, Mapping) else f"a mapping with {shown(list(state)[:8])}"
        got = f"format {shown(found)}" if isinstance(state, Mapping) and "format" in state else what
        raise ConvAwareError(f"state_dict must be a Session.state_dict() of format {OLDEST} to {FORMAT}, got {got}")
    keys(state, KEYS, "state_dict")
    flops, groups, saved, counts = (state[key] for key in ("flops", "groups", "parameters", "backwards"))
    demand(is_row(groups) and all(isinstance(g, str) for g in groups), "groups", groups, "a list of names")
    ok = is_row(flops) and len(flops) == 2 and all(is_number(each) and each >= 0 for each in flops)
    demand(ok, "flops", flops, "two finite numbers >= 0")
    step = state["step_flops"]
    demand(is_number(step) and step >= 0, "step_flops", step, "a finite number >= 0")
    ok = is_row(counts) and len(counts) == 2 and all(map(is_count, counts))
    demand(ok, "backwards", counts, f"two ints >= 0 and <= {LARGEST}")
    forward = state["forward_flops"]
    ok = forward is None or (is_number(forward) and forward >= 0)
    demand(ok, "forward_flops", forward, "a finite number >= 0, or None")
    _check_losses(state["losses"])
    _check_about(state["about"])
    check_history(state["history"])
    _check_model_pin(state["pin"])
    check_saved(state["agreements"])
    demand(isinstance(saved, Mapping), "parameters", saved, "a mapping of names to entries")
    for name, entry in saved.items():
        demand(isinstance(name, str), "parameters", name, "a mapping of names to entries")
        if params is not None and name not in params:
            raise unknown("parameter in state_dict:", name, params)
        where = f"{ENTRY}{name!r}"
        keys(entry, {"step", "pin"}, where, others=True)
        demand(is_count(entry["step"]), f"{name!r}: step", entry["step"], COUNT)
    return state


def _check_about(about: Any) -> None:
    """Of `describe`, or empty."""

    must = demand_of("about: ")
    demand(isinstance(about, Mapping), "about", about, "a mapping")
    if not about:
        return
    keys(about, {"options", "versions", "run", "why", "graphs", "parameters"}, f"{ENTRY}about")
    keys(about["why"], {"weights", "nothing", "families"}, f"{ENTRY}about: why")
    families = about["why"]["families"]
    must(isinstance(families, Mapping), "why['families']", families, "a mapping of names")
    texts = {**about["why"], **{f"families[{name!r}]": reason for name, reason in families.items()}}
    for name, value in texts.items():
        must(name == "families" or isinstance(value, str), f"why: {name}", value, "a str")
    for field in ("options", "versions", "run", "parameters"):
        ok = isinstance(about[field], Mapping) and all(isinstance(name, str) for name in about[field])
        must(ok, field, about[field], "a mapping of names")
    for name, value in about["options"].items():
        must(isinstance(value, str) or is_number(value), f"options[{name!r}]", value, "a number or a str")
    for field in ("versions", "run"):
        for name, value in about[field].items():
            must(isinstance(value, str), f"{field}[{name!r}]", value, "a str")
    must(is_count(about["graphs"]), "graphs", about["graphs"], COUNT)
    for name, value in about["parameters"].items():
        where = f"parameters[{name!r}]"
        keys(value, {"flops", "reason"}, f"{ENTRY}about: {where}")
        must(is_number(value["flops"]) and value["flops"] >= 0, f"{where}: flops", value["flops"], "a number >= 0")
        must(isinstance(value["reason"], str), f"{where}: reason", value["reason"], "a str")


def _check_losses(losses: Any) -> None:
    """Of `Losses.to_dict()`."""
    keys(losses, {"step", "loss"}, f"{ENTRY}losses")
    step, loss = losses["step"], losses["loss"]
    ok = isinstance(step, torch.Tensor) and step.dim() == 1 and is_array(step, torch.int64, tuple(step.shape))
    demand(ok and bool((step.diff() > 0).all()), "losses: step", step, "int64 [losses], rising, on the host")
    demand(is_array(loss, torch.float64, tuple(step.shape)), "losses: loss", loss, f"float64 {list(step.shape)}")


def check_history(history: Any) -> None:
    """Raise a ConvAwareError unless it is of `History.to_dict()`."""
    like = History.empty().to_dict()
    keys(history, like.keys(), f"{ENTRY}history")

    must = demand_of("history: ")
    for field in ("groups", "families", "kinds"):
        names = history[field]
        must(is_row(names) and all(isinstance(name, str) for name in names), field, names, "a list of names")
    families, step = len(history["families"]), history["step"]
    must(len(history["kinds"]) == families, "kinds", history["kinds"], f"{families} names")
    must(isinstance(step, torch.Tensor) and step.dim() == 1, "step", step, "int64 [measurements] on the host")
    sizes = dict.fromkeys(BY_STEP, step.shape) | dict.fromkeys(BY_GROUP, (*step.shape, len(history["groups"])))
    for field, tensor in like.items():
        if isinstance(tensor, torch.Tensor):
            shape = tuple(sizes.get(field, (len(history["groups"]),)))
            allowed = f"{str(tensor.dtype).removeprefix('torch.')} {list(shape)} on the host"
            must(is_array(history[field], tensor.dtype, shape), field, history[field], allowed)
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
    must(is_count(stride) and stride > 0, "stride", stride, f"an int >= 1 and <= {LARGEST}")


def _check_entry(name: str, entry: Mapping[str, Any], param: ParamState) -> None:
    must = demand_of(f"{name!r}: ")
    shape, key, pin = entry["shape"], entry["key"], entry["pin"]
    must(is_row(shape) and all(map(is_count, shape)), "shape", shape, "a tuple of sizes")
    if tuple(shape) != param.shape:
        raise ConvAwareError(f"{ENTRY}{name!r} is for shape {tuple(shape)}, the model's parameter has {param.shape}")
    must(key is None or is_count(key), "key", key, f"{COUNT}, or None")
    ok = entry["frozen"] is None or is_count(entry["frozen"])
    must(ok, "frozen", entry["frozen"], f"{COUNT}, or None")
    shard = entry["shard"]
    ok = shard is None or (is_row(shard) and len(shard) == 3 and all(map(is_count, shard)))
    must(ok, "shard", shard, "(dim, start, stop) or None")
    since = entry["counted_from"]
    must(is_count(since) and since <= entry["step"], "counted_from", since, f"{COUNT}, and no later than step")
    blocks = _check_partition(entry["partition"], param.shape, must)
    must(is_array(entry["skipped"], torch.bool, blocks), "skipped", entry["skipped"], f"bool [{blocks}] on the host")
    counted = entry["counted"]
    ok = is_array(counted, torch.int64, blocks) and bool(((counted >= 0) & (counted <= LARGEST)).all())
    must(ok, "counted", counted, f"int64 [{blocks}] >= 0 and <= {LARGEST} on the host")
    step, allowed = entry["step_counted"], "a whole number >= 0"
    must(isinstance(step, int) and not isinstance(step, bool) and step >= 0, "step_counted", step, allowed)
    keys(entry["blocks"], set(SAVED), f"{ENTRY}{name!r}: blocks")
    for field in SAVED:
        dtype = torch.from_numpy(np.empty(0, COLUMNS[field].dtype)).dtype
        array, allowed = entry["blocks"][field], f"{str(dtype).removeprefix('torch.')} [{blocks}] on the host"
        must(is_array(array, dtype, blocks), f"blocks[{field!r}]", array, allowed)
    for field, (right, allowed) in VALUES.items():
        array = entry["blocks"][field]
        must(bool(right(array).all()), f"blocks[{field!r}]", array.tolist(), allowed)
    _check_pin(pin, blocks, must)
    if (norm_shares := entry["norm_shares"]) is not None:
        keys(norm_shares, {"order", "values", "known"}, f"{ENTRY}{name!r}: norm_shares")
        order = norm_shares["order"]
        must(isinstance(order, float) and order > 0.0, "norm_shares['order']", order, "a float > 0")
        for field, dtype in (("values", torch.float32), ("known", torch.bool)):
            allowed = f"{str(dtype).removeprefix('torch.')} [{blocks}] on the host"
            must(is_array(norm_shares[field], dtype, blocks), f"norm_shares[{field!r}]", norm_shares[field], allowed)
        shares = norm_shares["values"]
        must(not bool((shares < 0).any()), "norm_shares['values']", shares.tolist(), ">= 0 or NaN")
    if (in_flight := entry["in_flight"]) is not None:
        keys(in_flight, {"values", "sampled"}, f"{ENTRY}{name!r}: in_flight")
        values, sampled = in_flight["values"], in_flight["sampled"]
        rows = 2 if entry["shard"] is None else 3
        ok = any(is_array(values, dtype, (rows, blocks)) for dtype in (torch.float64, torch.float32))
        must(ok, "in_flight['values']", values, f"floats [{rows}, {blocks}] on the host")
        ok = sampled is None or is_array(sampled, torch.bool, blocks)
        must(ok, "in_flight['sampled']", sampled, f"bool [{blocks}] on the host or None")


def _check_partition(partition: Any, shape: tuple[int, ...], must: Demand) -> int:
    """The number of blocks that it makes."""
    if partition is None:
        return 0
    ok = is_row(partition) and len(partition) == 3 and all(map(is_count, partition))
    must(ok, "partition", partition, "(dim, block, rows) or None")
    dim, block, rows = partition
    ok = dim < len(shape) and block >= 1 and rows == shape[dim]
    must(ok, "partition", partition, f"(dim, block >= 1, rows) of a parameter of shape {shape}")
    return Partition(dim, block, rows).blocks


def _check_pin(pin: Any, blocks: int, must: Demand) -> None:
    if pin is None:
        return
    must(is_row(pin) and len(pin) == 3, "pin", pin, "(mask, keep, seed) or None")
    mask, keep, seed = pin
    of_bools = is_row(mask) and all(on is None or isinstance(on, bool) for on in mask)
    must(mask is None or (of_bools and len(mask) == blocks), "pin's mask", mask, f"{blocks} bools and Nones, or None")
    must(is_number(keep) and 0.0 <= keep <= 1.0, "pin's keep", keep, "between 0 and 1")
    must(is_seed(seed), "pin's seed", seed, f"an int from 0 to {LARGEST_SEED}")


def _check_model_pin(pin: Any) -> None:
    if pin is None:
        return
    keys(pin, {field.name for field in fields(ModelPin)}, f"{ENTRY}pin")
    keep, seed, blocks, params = pin["keep"], pin["seed"], pin["blocks"], pin["params"]
    ok = keep is None or (is_number(keep) and 0.0 <= keep <= 1.0)
    demand(ok, "pin: keep", keep, "between 0 and 1, or None")
    demand(is_seed(seed), "pin: seed", seed, f"an int from 0 to {LARGEST_SEED}")
    demand(isinstance(pin["rest"], bool), "pin: rest", pin["rest"], "a bool")
    for what, said in (("blocks", blocks), ("params", params)):
        demand(isinstance(said, Mapping), f"pin: {what}", said, "a mapping of parameters' names")
        demand(all(isinstance(name, str) for name in said), f"pin: {what}", list(said), "names of parameters")
    for name, row in blocks.items():
        ok = is_row(row) and all(on is None or isinstance(on, bool) for on in row)
        demand(ok, f"pin: blocks[{name!r}]", row, "a tuple of bools and Nones")
    for name, on in params.items():
        demand(isinstance(on, bool), f"pin: params[{name!r}]", on, "a bool")
