"""What a user freezes and thaws by name: parameters, modules, families and groups, now and whenever they come."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from cacompile.errors import ConvAwareError, shown, unknown
from cacompile.hooks.steps import follow_optimizers
from cacompile.names import find_params, fits, prefixes
from cacompile.state.params import ParamState
from cacompile.state.pins import attend, hold_pins
from cacompile.state.registry import registry

from .pinned import Pinned
from .pinning import TOO_EARLY, Names


class Said(NamedTuple):
    """What was said of a parameter by its name."""

    anything: bool
    since: int | None
    """The step after which it was frozen as a whole; None: it was not."""
    blocks: tuple[int, ...]
    """The same of its blocks, -1 for None; empty where nothing is known of them."""


UNSAID = Said(False, None, ())


class Freezing(Pinned):
    """A model of which a user may freeze parts."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model)
        self._decided: dict[str, int | None] = {}
        """Parameter's name -> since which step it is frozen, or None: for parameters that come in its place."""
        self._decided_blocks: dict[str, np.ndarray] = {}
        self._fit: dict[str, list[str]] = {}
        """Pattern -> the parameters that it names."""
        self._fit_among: list[str] = []
        """Of all of these."""

    def hold_pin(self) -> None:
        """Freeze and pin what has come since."""
        self._hold_frozen()
        super().hold_pin()

    def freeze(self, *patterns: str) -> list[str]:
        """Freeze parameters and groups until `thaw`: as with requires_grad=False, without compiling anything again.

        The gradient of a frozen parameter is None: no weight decay, no momentum, its optimizer state stays. Where all
        below some point is frozen the backward ends there, once it was compiled so. Of a group that is a part of
        parameters, gradients are zeros, and weights and state are put back after each step of a torch optimizer.
        Change what is frozen between steps: gradients that are there are dropped.

        patterns: names of parameters, modules, families and groups, or `fnmatch` patterns of them, such as
        "encoder.layer.[0-3].*". Where a pattern names parameters or modules, it means whole parameters, else groups.
        Returns the names of the parameters and groups that were not frozen before. Raises ConvAwareError for a pattern
        that nothing is called by.
        """
        return self._freeze(patterns)

    def thaw(self, *patterns: str) -> list[str]:
        """End `freeze` for these, or for all if none is given: training goes on from there.

        A parameter that was frozen as a whole is thawed as a whole. Returns the names of what was frozen before.
        """
        return self._freeze(patterns or ("*",), thaw=True)

    @contextlib.contextmanager
    def frozen(self, *patterns: str) -> Iterator[list[str]]:
        """`freeze` while in the context; what was frozen before stays so."""
        before = self._said()
        names = self.freeze(*patterns)
        states = [param for name, param in self.params.items() if name in names]
        now = self._said()
        said = {name: (before.get(name, UNSAID), now[name]) for name in now if now[name] != before.get(name)}
        try:
            yield names
        finally:
            self._end(names, states, said)

    @property
    def frozen_since(self) -> dict[str, int]:
        """Name of what is frozen -> the optimizer step after which: whole parameters, then groups of others."""
        params = self.params
        found = {name: param.frozen for name, param in params.items() if param.frozen is not None}
        index = self.index
        since = index.least(np.concatenate([np.zeros(0, np.int64), *map(_since, index.params)]))
        return found | {name: int(step) for name, step in zip(self.names()[1], since) if step >= 0}

    def _freeze(self, patterns: tuple[Any, ...], *, thaw: bool = False) -> list[str]:
        if not patterns:
            raise ConvAwareError("freeze takes at least one name or pattern, got none")
        with self.looking():
            params = self._claim()
            since = None if thaw else self.step_count
            wanted, later, groups = self._found(patterns, params)
            follow_optimizers()
            attend(self)
            changed = [name for name in wanted if (params[name].frozen is None) is (since is not None)]
            for name in wanted:
                if name in changed or not params[name].settled:
                    params[name].freeze(since)
            changed += self._freeze_groups(groups, wanted, since)
            self._note_frozen()
            self._decided |= dict.fromkeys(later, since)
            hold_pins(but=self)
            return changed

    def _said(self) -> dict[str, Said]:
        """What is said by now of each parameter, by all of its names."""
        blocks = {name: tuple(since.tolist()) for name, since in self._decided_blocks.items()}
        return {name: Said(True, since, blocks.get(name, ())) for name, since in self._decided.items()}

    def _end(self, names: list[str], states: list[ParamState], said: Mapping[str, tuple[Said, Said]]) -> None:
        """Thaw what a context froze.

        names: of it; states: of its parameters, which may have left the model; said: name of each parameter of which
        the context has said something -> what was said before, and what it has said.
        """
        with self.looking():
            params = self._claim()
            whole = [name for name, (before, now) in said.items() if before.since is None is not now.since]
            ended = dict.fromkeys([*states, *(params[name] for name in whole if name in params)])
            for param in (param for param in ended if param.frozen is not None):
                param.freeze(None)
            self._freeze_groups({i for i, name in enumerate(self.names()[1]) if name in names}, [], None)
            self._note_frozen()
            here = {other for name in params for other in self._names[name]}
            for name, (before, _) in said.items():
                if name not in here:  # gone, or not trained; it may come back
                    self._decided.pop(name, None)
                    self._decided_blocks.pop(name, None)
                    if before.anything:
                        self._decided[name] = before.since
                    if before.blocks:
                        self._decided_blocks[name] = np.array(before.blocks, np.int64)
            hold_pins(but=self)

    def _found(
        self, patterns: tuple[Any, ...], params: Mapping[str, ParamState]
    ) -> tuple[list[str], list[str], set[int]]:
        """The parameters that patterns name, those of them that are not trained, and the numbers of groups, of patterns
        that name no parameter."""
        names, index = self._names, self.index
        families, groups = self.names()
        wanted: dict[str, None] = {}
        every: dict[str, None] = {}
        numbers: set[int] = set()
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise ConvAwareError(f"what is frozen must be names or patterns of type str, got {shown(pattern)}")
            if whole := self._fitting(pattern, names):
                also = {other for name in whole for other in names[name]}
                wanted |= dict.fromkeys(name for name in params if name in also)
                every |= dict.fromkeys(also)
                continue
            of = [i for i, (n, f) in enumerate(zip(groups, index.family)) if fits((families[f], n), pattern)]
            if not of:
                known = {part for name in names for part in prefixes(name)} | {*families, *groups}
                hint = "" if groups else TOO_EARLY
                raise unknown(f"parameter, module, family or group{hint}:", pattern, known)
            numbers.update(of)
        tracked = {other for name in wanted for other in names[name]}
        return list(wanted), [name for name in every if name not in tracked], numbers

    def _fitting(self, pattern: str, names: Names) -> list[str]:
        """The parameters that a pattern names. Looked for once: schedules ask for the same few again and again."""
        if self._fit_among != (among := list(names)):
            self._fit_among, self._fit = among, {}
        if pattern not in self._fit:
            self._fit[pattern] = find_params(pattern, names)
        return self._fit[pattern]

    def _freeze_groups(self, numbers: set[int], whole: list[str], since: int | None) -> list[str]:
        """Freeze groups but for what is frozen already; thaw those that were named, and those of thawed parameters."""
        index, names, params = self.index, self.names()[1], self.params
        frozen = np.concatenate([np.zeros(0, np.int64), *(param.column("frozen") for param in index.params)])
        before, chosen = index.least(frozen), np.isin(index.of_block, sorted(numbers))
        if since is None:
            own = {id(params[name]) for name in whole}
            of_whole = [np.full(param.blocks, id(param) in own) for param in index.params]
            chosen |= np.isin(index.of_block, index.of_block[np.concatenate([np.zeros(0, bool), *of_whole])])
        step = -1 if since is None else since
        after = np.where(chosen & ((frozen < 0) | (since is None)), step, frozen)
        for param, part in zip(index.params, np.split(after, np.cumsum([p.blocks for p in index.params])[:-1])):
            if not np.array_equal(part, param.column("frozen")):
                param.freeze_blocks(part)
        changed = (before >= 0) != (index.least(after) >= 0)
        return [name for name, now in zip(names, changed) if now]

    def _note_frozen(self) -> None:
        """Remember what is said by now, by this session or another, for what comes later under the same names."""
        names = self._names
        for name, param in self.params.items():
            for other in names[name]:
                if param.settled:
                    self._decided[other] = param.frozen
                if param.blocks:
                    self._decided_blocks[other] = param.column("frozen").copy()

    def _hold_frozen(self) -> None:
        """Freeze what has come in the place of something that was frozen."""
        if not self._decided:
            return
        for name, param in self.trained():
            if self._decided.get(name) is not None and param.requires_grad:
                registry.track(param, name)
        for name, state in self.params.items():
            if state.settled or name not in self._decided:
                continue
            blocks = self._decided_blocks.get(name)
            if state.blocks and blocks is not None and len(blocks) == state.blocks:
                state.freeze_blocks(blocks)
            state.freeze(self._decided[name])
        self._note_frozen()


def _since(param: ParamState) -> np.ndarray:
    """Since when its blocks are frozen by themselves; nothing while all of it is."""
    own = param.column("frozen")
    return np.full_like(own, -1) if param.frozen is not None else own
