"""The pin of a whole model: what it says of each parameter, those that come later as well."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cacompile.config import LARGEST_SEED
from cacompile.errors import ConvAwareError, shown, unknown
from cacompile.state.groups import GroupIndex
from cacompile.state.params import ParamState
from cacompile.state.pins import Pin

TOO_EARLY = " (groups are known after the first forward pass)"

Names = Mapping[str, Sequence[str]]
"""A parameter's name in the model -> all its names, of which a tied one has several."""


@dataclass(frozen=True, slots=True)
class ModelPin:
    """One probability for every parameter; or what is said of blocks and parameters by name."""

    keep: float | None = None
    seed: int = 0
    blocks: Mapping[str, tuple[bool | None, ...]] = field(default_factory=dict)
    """Parameter's name -> what was said of its blocks' groups or their families; None: nothing."""
    params: Mapping[str, bool] = field(default_factory=dict)
    """Parameter's name -> what was said of it as a whole."""
    rest: bool = False
    """Whether all of which nothing is said is held on; else it is not held."""

    def is_final(self, parted: bool) -> bool:
        """Whether a parameter keeps the pin that it gets; one that is not parted yet may come into a group."""
        return parted or self.keep is not None

    def of(self, params: Mapping[str, ParamState], names: Names) -> dict[str, Pin | None]:
        """Parameter's name -> its pin. A block of which nothing was said is like the group that it is in."""
        if self.keep is not None:
            return dict.fromkeys(params, Pin(keep=self.keep, seed=self.seed))
        rest = True if self.rest else None
        whole = {name: next((self.params[n] for n in names[name] if n in self.params), rest) for name in params}
        pins = {name: None if on is None else Pin(keep=float(on)) for name, on in whole.items()}
        parted = {name: param for name, param in params.items() if param.blocks}
        index = GroupIndex(list(parted.values()))
        said = [self._said(names[name], param.blocks) for name, param in parted.items()]
        groups = np.full(len(index.all), -1)
        np.maximum.at(groups, index.of_block, np.concatenate([np.zeros(0, int), *said]))  # all on where some is
        for name, each in zip(parted, index.split(groups)):
            mask = tuple(whole[name] if on < 0 else bool(on) for on in each)
            pins[name] = None if all(on is None for on in mask) else Pin(mask=mask)
        return pins

    def _said(self, names: Sequence[str], blocks: int) -> np.ndarray:
        """int [blocks]: 1 on, 0 off, -1 nothing was said."""
        rows = (self.blocks[name] for name in names if len(self.blocks.get(name, ())) == blocks)
        return np.array([-1 if on is None else int(on) for on in next(rows, (None,) * blocks)], int)

    def to_dict(self) -> dict[str, Any]:
        said = {"blocks": dict(self.blocks), "params": dict(self.params)}
        return {"keep": self.keep, "seed": self.seed, "rest": self.rest, **said}


def every_name(params: Iterable[tuple[str, torch.nn.Parameter]]) -> Names:
    """All names of each parameter, of a module's names and parameters without any left out."""
    found: dict[int, list[str]] = {}
    for name, param in params:
        found.setdefault(id(param), []).append(name)
    return {name: names for names in found.values() for name in names}


def drawn(keep: Any, seed: int) -> ModelPin:
    """`keep` for all groups, drawn once."""
    is_number = isinstance(keep, numbers.Real) and not isinstance(keep, bool)
    if not is_number or not 0.0 <= keep <= 1.0:
        raise ConvAwareError(f"keep must be a number between 0 and 1, got {shown(keep)}")
    return ModelPin(keep=float(keep), seed=seed)


def checked_seed(seed: Any) -> int:
    is_int = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if not is_int or not 0 <= seed <= LARGEST_SEED:
        raise ConvAwareError(f"seed must be an int >= 0 and <= {LARGEST_SEED}, got {shown(seed)}")
    return int(seed)


def listed(mask: Any, params: Mapping[str, ParamState], names: Names) -> ModelPin:
    """A mask of all groups that these parameters have."""
    values = _bools(mask)
    parted = {name: param for name, param in params.items() if param.blocks}
    index = GroupIndex(list(parted.values()))
    if len(values) != len(index.all):
        hint = "" if index.all else TOO_EARLY
        wanted = f"one entry for each of the {len(index.all)} groups{hint}"
        raise ConvAwareError(f"mask must have {wanted}, got {len(values)}")
    split = zip(parted, index.split(np.array(values, bool)))
    return ModelPin(blocks={n: tuple(each.tolist()) for name, each in split for n in names[name]}, rest=True)


def _bools(mask: Any) -> list[bool]:
    """Numbers are refused, even 0 and 1: they may be the groups' indices."""
    allowed = "a sequence, tensor or array of bool, or a dict"
    if isinstance(mask, (torch.Tensor, np.ndarray)):
        is_bool = mask.dtype in (torch.bool, np.dtype(bool))
        if not is_bool or (isinstance(mask, torch.Tensor) and (mask.is_meta or mask.layout != torch.strided)):
            what = f"{type(mask).__name__} of {mask.dtype}, {list(mask.shape)}"
            raise ConvAwareError(f"mask must be {allowed}, got a {what}: {shown(mask)}")
        return mask.reshape(-1).tolist()
    if not isinstance(mask, Sequence) or isinstance(mask, (str, bytes)):
        raise ConvAwareError(f"mask must be {allowed}, got {shown(mask)}")
    for i, on in enumerate(mask):
        if not _is_bool(on):
            raise ConvAwareError(f"mask must be {allowed}, got {shown(on)} as entry {i}")
    return [bool(on) for on in mask]


def _is_bool(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))


def named(mask: Mapping[Any, Any], params: Mapping[str, ParamState], names: Names) -> ModelPin:
    """What is said of groups, families and parameters by name."""
    parted = {name: param for name, param in params.items() if param.blocks}
    index = GroupIndex(list(parted.values()))
    families, groups = index.names({id(param): name for name, param in parted.items()})
    known = {*names, *families, *groups}
    for name, on in mask.items():
        if name not in known:
            hint = "" if groups else TOO_EARLY
            raise unknown(f"group, family or parameter in mask{hint}:", name, known)
        if not _is_bool(on):
            raise ConvAwareError(f"mask[{name!r}] must be True or False, got {shown(on)}")
    said = {name: bool(on) for name, on in mask.items()}
    chosen = [said.get(name, said.get(families[f])) for name, f in zip(groups, index.family)]
    blocks: dict[str, tuple[bool | None, ...]] = {}
    for name, each in zip(parted, index.split(np.arange(len(groups)))):
        row = tuple(chosen[i] for i in each)
        if any(on is not None for on in row):
            blocks |= dict.fromkeys(names[name], row)
    also = {n: on for name, on in said.items() if name in names for n in names[name]}
    return ModelPin(blocks=blocks, params=also | {name: on for name, on in said.items() if name in names})
