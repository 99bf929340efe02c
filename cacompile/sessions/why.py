"""Why a group, a family of them, or the whole model is not skipped, in words; and what can be skipped at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cacompile.config import Config
from cacompile.controller.weigh import SELDOM, UNREAD, step_flops, weigh, why_dense
from cacompile.state.binding import GraphBinding
from cacompile.state.frozen import newest_freeze
from cacompile.state.groups import GroupIndex
from cacompile.state.params import ParamState
from cacompile.state.table import newest_structure

if TYPE_CHECKING:
    from .session import Session

NOT_COMPILED = (
    "No parameter has groups: the model has not been trained with backend='convaware' yet "
    '(torch.compile(model, backend="convaware"), then a forward pass with gradients).'
)

SMALL_PART = 0.2
"""Share of a step's FLOPs: where dW is less there is little to be saved. With nothing frozen it is about a third."""

PINNED_ON, PINNED_OFF, KEPT, FROZEN = "pinned on", "pinned off", "kept by the option keep", "frozen"
NOT_MADE = "its masked version could not be made, the log says why"
WARMS_UP = "warms up until step"

CLOSED = ("tolerance", "max_skip")
"""Options that have nothing skipped where they are 0."""


@dataclass(frozen=True, slots=True)
class Why:
    """What can be skipped of a model, and why what can is not."""

    weights: int
    """Parameters of two dimensions or more that are trained."""
    skippable: int
    """Those of them of which groups can be skipped."""
    start: int
    """Optimizer steps before anything is."""
    families: Mapping[str, str]
    """Name of a family -> why most of it is computed in every step, pinned or frozen; empty where it is skipped."""
    nothing: str
    """Why nothing at all is skipped, in a sentence; empty if something is."""
    short: str = ""
    """What of the option budget cannot be saved, in a sentence; empty where it is, or where nothing is skipped."""

    @property
    def line(self) -> str:
        """`8 of 12 weights can be skipped, from step 20 on`; empty for a model that has not run with us."""
        if self.nothing == NOT_COMPILED:
            return ""
        text = f"{self.skippable} of {self.weights} weights can be skipped"
        return f"{text}, from step {self.start} on" if self.skippable else text


def why(view: Session) -> Why:
    """Reads host state only."""
    config, index = view.config, view.index
    trained = [param for _, param in view.trained() if param.requires_grad and param.dim() > 1]
    skippable = {id(state.param) for binding in view.bindings for state in binding.skippable}
    can = sum(id(param) in skippable for param in trained)
    if config is None:
        ran = view.ran
        return Why(len(trained), can, 0, {}, _nothing_planned(ran) if ran else NOT_COMPILED)
    reasons, names = _reasons(view, index, config), view.families
    flops = index.sum(index.column("flops"))
    of_family = [index.family == i for i in range(len(names))]
    families = {name: _commonest(reasons[own], flops[own]) for name, own in zip(names, of_family)}
    told = families if any(families.values()) and all(families.values()) else {}
    nothing, short = _sentence(told, config, view.step_count), _short(index, config)
    return Why(len(trained), can, config.warmup_steps, families, nothing, "" if nothing else short)


def small_part(dw: float, step: float) -> str:
    """A warning where dW is a small part of a step; empty where it is not, or not known. Both in FLOPs."""
    if not step or dw >= SMALL_PART * step:
        return ""
    return f"dW is only {dw / step:.1%} of a step's FLOPs here: no more than that can ever be saved"


def _reasons(view: Session, index: GroupIndex, config: Config) -> np.ndarray:
    """Of each group, str [groups]; empty where it is skipped now and then."""
    planned = {id(state) for binding in view.bindings for state in binding.skippable}

    def every(of_block: Callable[[ParamState], np.ndarray]) -> np.ndarray:
        return index.every(np.concatenate([np.zeros(0, bool), *map(of_block, index.params)]))

    on, pinned = index.every(index.column("on")), every(lambda param: param.pinned_blocks)
    reasons = np.full(len(index.all), "", object)
    reasons[index.of_block] = _judged(view, index)
    for name in CLOSED:
        if getattr(config, name) == 0.0 and not (name == "tolerance" and config.budget):
            reasons[:] = f"the option {name} is 0"
    if view.step_count < config.warmup_steps:
        reasons[:] = f"{WARMS_UP} {config.warmup_steps}"
    reasons[~every(lambda param: ~param.column("kept"))] = KEPT
    reasons[pinned & on], reasons[pinned & ~on] = PINNED_ON, PINNED_OFF
    reasons[every(lambda param: param.frozen_blocks)] = FROZEN
    if view.bindings:
        reasons[every(lambda param: np.full(param.blocks, id(param) not in planned))] = NOT_MADE
    return reasons


def _judged(view: Session, index: GroupIndex) -> np.ndarray:
    """What the policy says of each block's group, str [blocks]; asked once after each decision."""
    key = newest_structure(), newest_freeze(), tuple(param.decided for param in index.params)
    if view.judged is None or view.judged[0] != key or len(view.judged[1]) != len(index.of_block):
        view.judged = key, _asked(index)
    return view.judged[1]


def _asked(index: GroupIndex) -> np.ndarray:
    """The same, of parameters that one controller weighs together."""
    together: dict[tuple[int, Config], list[ParamState]] = {}
    for param in index.params:
        together.setdefault((param.decided[0], param.config), []).append(param)
    found: dict[int, np.ndarray] = {}
    for (_, config), params in together.items():
        own = GroupIndex(params)
        fixed = np.concatenate([param.frozen_blocks for param in params])
        fixed |= ~own.every(~own.column("kept"))[own.of_block]
        descent, ratio, flops, usual = map(own.column, ("descent", "update_ratio", "flops", "mean_descent"))
        weighed = weigh(own, descent, ratio, flops, usual, fixed, step_flops(params))
        reasons = np.array(why_dense(weighed, config), dtype=object)
        if not np.isfinite(descent).any():
            reasons[:] = UNREAD
        reasons[own.least(own.column("keep")) < SELDOM] = ""
        found |= dict(zip(map(id, params), own.split(reasons)))
    return np.concatenate([np.zeros(0, dtype=object), *(found[id(param)] for param in index.params)])


def _commonest(reasons: np.ndarray, flops: np.ndarray) -> str:
    """Of one family's groups, by their FLOPs."""
    weights: Counter[str] = Counter()
    for reason, each in zip(reasons, flops):
        weights[reason] += each + 1e-9
    return weights.most_common(1)[0][0]


def _sentence(families: Mapping[str, str], config: Config, steps: int) -> str:
    """families: all, and why nothing of each is skipped; none where something is."""
    reasons = Counter(families.values())
    if not reasons or PINNED_OFF in reasons:
        return ""
    if set(reasons) == {PINNED_ON}:
        return "A mask is pinned that keeps everything."
    for name in CLOSED:
        if getattr(config, name) == 0.0 and not (name == "tolerance" and config.budget):
            return f"The option {name} is 0: nothing may be skipped."
    if any(reason.startswith(WARMS_UP) for reason in reasons):
        return f"Nothing is skipped in the first {config.warmup_steps} steps (option warmup_steps)."
    if set(reasons) == {UNREAD}:
        return f"Scores are read every {config.monitor_every} steps; {steps} have been done."
    parts = [f"{n} of {len(families)} families: {reason}" for reason, n in reasons.most_common()]
    return f"Nothing is skipped now. {'; '.join(parts)}."


def _short(index: GroupIndex, config: Config) -> str:
    """Of a budget that is missed by more than a twentieth of itself."""
    if not config.budget or (whole := step_flops(index.params)) is None:
        return ""
    keep = index.least(index.column("keep"))
    saved = float((index.sum(index.column("flops")) * (1.0 - keep)).sum()) / whole
    if (keep >= SELDOM).all() or saved >= 0.95 * config.budget:
        return ""
    return (
        f"The option budget asks for {config.budget:.1%} of a step's FLOPs, and {saved:.1%} are saved: more is not "
        f"allowed by max_skip ({config.max_skip:g}), by the turns of what is alike, or by what is always computed."
    )


def _nothing_planned(ran: Sequence[GraphBinding]) -> str:
    """Of a model that has run, and nothing of which can be skipped."""
    reasons = Counter(dense.reason for binding in ran for dense in binding.layout.dense)
    parts = [f"{reason} ({n})" for reason, n in reasons.most_common(3)]
    return f"Nothing can be skipped: {'; '.join(parts)}." if parts else "Nothing can be skipped."
