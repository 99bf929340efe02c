"""What the options `frozen` and `keep` say of the parameters that a graph begins to run with."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from cacompile.config import Config
from cacompile.layout import GradLayout, MaskLayout
from cacompile.names import find_params, fits

from .params import ParamState
from .registry import registry

log = logging.getLogger(__name__)

_found: set[str] = set()
"""Patterns that have named something in some graph."""


def begin(layout: MaskLayout, inputs: Sequence[Any], config: Config, states: Sequence[ParamState | None]) -> None:
    """Apply the options, by the names that the graph has; `frozen` where nobody has said anything of a parameter yet.

    states: of the layout's gradients; None where one has no blocks in this graph.
    """
    if not (config.frozen or config.keep):
        return
    names = [name for name, _ in layout.params]
    frozen, kept = ({n for p in of for n in find_params(p, names)} for of in (config.frozen, config.keep))
    blocks = [(grad, state) for grad, state in zip(layout.grads, states) if state is not None]
    since = {id(state): _blocks(layout, grad, config.frozen, names) for grad, state in blocks if not state.settled}
    called = [*names, *(group.name for group in layout.groups), *(family.name for family in layout.families)]
    _found.update(p for p in (*config.frozen, *config.keep) if find_params(p, names) or fits(called, p))
    for name, index in layout.params:
        if isinstance(inputs[index], torch.nn.Parameter):
            state = registry.track(inputs[index], name)
            if name in frozen and not state.settled:
                state.freeze(state.step)
            state.settled = True
    for grad, state in blocks:
        named = since.get(id(state))
        if named is not None and named.any() and grad.param not in frozen:
            state.freeze_blocks(np.where(named, state.step, -1))
        state.column("kept")[:] |= _blocks(layout, grad, config.keep, names) | (grad.param in kept)


def warn_of_unfound(config: Config) -> None:
    """Say once which patterns of the options have named nothing so far; all graphs have run by the first step."""
    for option, patterns in (("frozen", config.frozen), ("keep", config.keep)):
        for pattern in (pattern for pattern in patterns if pattern not in _found):
            _found.add(pattern)
            log.warning("option %r: %r is no name in any compiled graph so far", option, pattern)


def _blocks(layout: MaskLayout, grad: GradLayout, patterns: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """bool [blocks]: those in groups that patterns name which name no parameter."""
    patterns = [pattern for pattern in patterns if not find_params(pattern, names)]
    groups = [layout.groups[number] for number in grad.groups]
    called = [(group.name, layout.families[group.family].name) for group in groups]
    return np.array([any(fits(each, pattern) for pattern in patterns) for each in called], bool)
