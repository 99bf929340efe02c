"""What ranks that agree must have alike, compared at each reading: what differs is an error, not drift."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from cacompile.config import Config
from cacompile.errors import ConvAwareError, shown
from cacompile.state.params import ParamState
from cacompile.version import VERSION


def about(members: Sequence[ParamState], *, grows: bool = False) -> dict[str, Any]:
    """What a rank's parameters are called, and with which options and version it trains them.

    grows: whether more may come, so that a rank may know of some that another did not know of when it told.
    """
    configs = list(dict.fromkeys(param.config for param in members if param.blocks))
    return {
        "version": VERSION,
        "grows": grows,
        "names": {param.place: param.name for param in members},
        "options": [_plain(config) for config in configs],
        "option_of": {param.place: configs.index(param.config) for param in members if param.blocks},
    }


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any], rank: int, other: int) -> None:
    """Raise ConvAwareError for the first thing that two ranks do not have alike."""

    def differ(what: str, mine: object, its: object) -> ConvAwareError:
        return ConvAwareError(
            f"{what} must be the same on all ranks, got {shown(mine)} on rank {rank} and {shown(its)} on rank {other}"
        )

    if ours["version"] != theirs["version"]:
        raise differ("the version of cacompile", ours["version"], theirs["version"])
    both, either = ours["names"].keys() & theirs["names"].keys(), ours["names"].keys() | theirs["names"].keys()
    for place in sorted(both if ours.get("grows") else either):
        mine, its = ours["names"].get(place), theirs["names"].get(place)
        if mine != its:
            raise differ("the parameters that an optimizer steps", mine, its)
    for place in sorted(ours["option_of"].keys() & theirs["option_of"].keys()):
        mine, its = (side["options"][side["option_of"][place]] for side in (ours, theirs))
        for name in mine:
            if mine[name] != its.get(name):
                what = f"option {name!r}, with which {ours['names'][place]} is compiled,"
                raise differ(what, mine[name], its.get(name))


def compare_states(ours: Mapping[str, Any], theirs: Mapping[str, Any], rank: int, other: int) -> None:
    """Raise ConvAwareError where two ranks have come to other masks than each other. ours, theirs: of `digest`."""
    for what in ours:
        if ours[what] != theirs.get(what):
            raise ConvAwareError(
                f"ranks {rank} and {other} have drifted apart: {what} differ after the same optimizer step. Load "
                "states on all ranks at the same step, or on none; else please report this"
            )


def digest(steps: Sequence[int], columns: Mapping[str, bytes]) -> dict[str, int]:
    """A hash of each thing that the next masks follow from."""
    found = {"their optimizer steps": zlib.crc32(repr(list(steps)).encode())}
    return found | {what: zlib.crc32(values) for what, values in columns.items()}


def _plain(config: Config) -> dict[str, Any]:
    """Its options, of which objects are only called by their type."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {
        name: value if isinstance(value, (int, float, str)) else type(value).__name__ for name, value in values.items()
    }
