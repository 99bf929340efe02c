"""A run as its reports show it: what follows from the measurements of a saved state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from cacompile.pages.numbers import count, percent
from cacompile.sessions.checkpoint import checked_run
from cacompile.sessions.why import NOT_COMPILED, small_part
from cacompile.state.history import History


@dataclass(frozen=True, slots=True)
class RunFamily:
    """Groups of one kind in one layer, measurement by measurement."""

    name: str
    kind: str
    flops: float
    """dW FLOPs of one backward."""
    skipped: np.ndarray
    """float [P, groups]: share of the steps in which each group is skipped from a measurement to the next, 0 to 1."""
    share: np.ndarray
    """float [P]: `skipped`, of all its dW FLOPs; NaN where unknown."""
    descent: np.ndarray
    """float [P]: expected loss decrease of one step; NaN where unknown."""
    update_ratio: np.ndarray
    """float [P]: movement in one step over size, mean over its dW FLOPs; NaN where unknown."""

    @property
    def mean(self) -> float:
        """`share` over the run, NaN if it never was known."""
        known = np.isfinite(self.share)
        return float(self.share[known].mean()) if known.any() else float("nan")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Steps in which the same versions of the backward ran."""

    start: int
    stop: int
    version: str
    """`dense`: Inductor's own; `masked`; or `both`: masked only in steps or graphs where something was off."""
    masked: float
    """Share of the backward passes, 0 to 1."""


@dataclass(frozen=True, slots=True)
class Reason:
    """Parameters that stay dense for one reason."""

    text: str
    params: tuple[str, ...]
    share: float
    """Of all dW FLOPs, 0 to 1."""


@dataclass(frozen=True)
class RunData:
    """What a saved state knows of its run."""

    history: History
    step: int
    """Optimizer steps done, at the last measurement or after it."""
    total: float
    """dW FLOPs that a dense run would have spent."""
    saved: float
    step_flops: float
    """Those of a dense run's forward and backward passes."""
    forward_flops: float
    """Those of them that forward passes took; NaN where the state does not know."""
    losses: tuple[np.ndarray, np.ndarray]
    """(int64 [losses] optimizer steps done, float64 [losses]), of those that somebody has told of."""
    backwards: int
    masked: int
    pinned: bool
    """Whether some mask is held by `Session.pin`."""
    about: Mapping[str, Any]
    frozen: Mapping[str, int]
    """What is frozen -> since which step; of a parameter of which only groups are, the first of them."""

    @classmethod
    def of(cls, state: Any) -> RunData:
        """Raises ConvAwareError for anything but a state of `Session.state_dict()`."""
        state = checked_run(state)
        params = state["parameters"].values()
        return cls(
            history=History.of(state["history"]),
            step=max((entry["step"] for entry in params), default=0),
            total=state["flops"][0],
            saved=state["flops"][1],
            step_flops=state["step_flops"],
            forward_flops=np.nan if state["forward_flops"] is None else state["forward_flops"],
            losses=(state["losses"]["step"].numpy(), state["losses"]["loss"].numpy()),
            backwards=state["backwards"][0],
            masked=state["backwards"][1],
            pinned=state["pin"] is not None or any(entry["pin"] is not None for entry in params),
            about=state["about"],
            frozen=_frozen(state["parameters"]),
        )

    @property
    def measurements(self) -> int:
        return len(self.history.step)

    @property
    def share(self) -> float:
        """Of all dW FLOPs so far, those skipped, 0 to 1."""
        return self.saved / self.total if self.total else 0.0

    @property
    def whole_share(self) -> float:
        """What that is of the FLOPs of forward and backward passes, 0 to 1."""
        return self.saved / self.step_flops if self.step_flops else 0.0

    @property
    def seconds(self) -> float:
        """Wall clock up to the last measurement."""
        return float(self.history.seconds[-1:].sum())

    @property
    def headline(self) -> str:
        if not self.step:
            return "Nothing can be skipped" if self.about and not self.history.groups else "No step has been done yet"
        if not self.saved:
            return f"Nothing was skipped in {count(self.step, 'step')}"
        steps = count(self.step, "step")
        return f"{percent(self.whole_share)} of the FLOPs of {steps} were skipped, {percent(self.share)} of dW"

    @property
    def parts(self) -> str:
        """What the steps' FLOPs are: `forward 33.3%, dX 33.3%, dW 33.3%`; dW alone where the state knows no more."""
        if not self.step_flops:
            return ""
        dw, forward = self.total / self.step_flops, self.forward_flops / self.step_flops
        if np.isnan(forward):
            return f"dW {percent(dw)}"
        return f"forward {percent(forward)}, dX {percent(max(0.0, 1.0 - forward - dw))}, dW {percent(dw)}"

    @property
    def small_part(self) -> str:
        """A warning where dW is a small part of a step; empty where it is not."""
        return small_part(self.total, self.step_flops)

    @property
    def identity(self) -> dict[str, str]:
        """What tells the run from others: model, when it began, device, optimizer; what is not known is not there."""
        return dict(self.about.get("run", {}))

    @cached_property
    def edges(self) -> np.ndarray:
        """int64 [P + 1]: the measurements' steps, and the last step, up to which the last one's probabilities hold."""
        return np.append(self.history.step, max(self.step, *self.history.step[-1:], 1))

    @cached_property
    def shares(self) -> np.ndarray:
        """float [P]: share of dW FLOPs that was skipped between the measurement before and each."""
        return _ratio(_steps(self.history.saved), _steps(self.history.total))

    @cached_property
    def cumulative(self) -> np.ndarray:
        """float [P]: share of dW FLOPs that was skipped up to each measurement."""
        return _ratio(self.history.saved, self.history.total)

    @cached_property
    def step_shares(self) -> np.ndarray:
        """float [P]: `shares`, of the steps' FLOPs; NaN where unknown."""
        return _ratio(_steps(self.history.saved), _steps(self.history.step_flops))

    @cached_property
    def step_cumulative(self) -> np.ndarray:
        """float [P]: `cumulative`, of the steps' FLOPs; NaN where unknown."""
        return _ratio(self.history.saved, self.history.step_flops)

    @cached_property
    def masked_shares(self) -> np.ndarray:
        """float [P]: share of backward passes that ran the masked version between the measurement before and each."""
        return _ratio(_steps(self.history.masked), _steps(self.history.backwards))

    @cached_property
    def step_seconds(self) -> np.ndarray:
        """float [P]: wall clock of a step since the measurement before; NaN for the first, which compiles."""
        each = np.diff(self.history.seconds, prepend=np.nan) / np.diff(self.history.step, prepend=0)
        return np.where(each > 0.0, each, np.nan)

    @cached_property
    def families(self) -> list[RunFamily]:
        """In the model's order."""
        kept = self.history
        found = []
        for number, (name, kind) in enumerate(zip(kept.families, kept.kinds)):
            own = kept.family == number
            flops = kept.flops[own]
            skipped, descent, ratio = 1.0 - kept.keep[:, own], kept.descent[:, own], kept.update_ratio[:, own]
            found.append(
                RunFamily(
                    name=name,
                    kind=kind,
                    flops=float(flops.sum()),
                    skipped=skipped,
                    share=_mean(skipped, flops),
                    descent=np.where(np.isnan(descent).all(1), np.nan, np.nansum(descent.astype(float), 1)),
                    update_ratio=_mean(ratio, flops),
                )
            )
        return found

    @property
    def kinds(self) -> list[str]:
        """Those that families have, in the order of their first."""
        return list(dict.fromkeys(family.kind for family in self.families))

    @cached_property
    def stretches(self) -> list[Stretch]:
        """From one change of the backward's version to the next; known to the measurement, not to the step."""
        found: list[tuple[int, int, str, list[float]]] = []
        steps = [0, *self.history.step.tolist()]
        for start, stop, share in zip(steps, steps[1:], self.masked_shares.tolist()):
            version = "dense" if not share > 0.0 else "masked" if share >= 1.0 else "both"
            if found and found[-1][2] == version:
                start, *_, shares = found.pop()
            else:
                shares = []
            found.append((start, stop, version, [*shares, share]))
        return [Stretch(start, stop, version, float(np.nanmean(shares))) for start, stop, version, shares in found]

    @cached_property
    def reasons(self) -> list[Reason]:
        """Why parameters stay dense, the dearest reason first."""
        params = self.about.get("parameters", {})
        total = sum(entry["flops"] for entry in params.values()) or 1
        found: dict[str, list[str]] = {}
        for name, entry in params.items():
            if entry["reason"]:
                found.setdefault(entry["reason"], []).append(name)
        reasons = [
            Reason(text, tuple(names), sum(params[name]["flops"] for name in names) / total)
            for text, names in found.items()
        ]
        return sorted(reasons, key=lambda reason: -reason.share)

    @property
    def why_nothing(self) -> str:
        """Why nothing has been skipped, in a sentence; empty if something has."""
        if self.saved:
            return ""
        if not self.history.groups and not self.about:
            return NOT_COMPILED
        if self.about and not self.about["why"]["weights"]:
            return "Why is not known: the state was saved by an earlier version."
        return self.about["why"]["nothing"] if self.about else ""

    def why(self, family: str) -> str:
        """Why nothing of a family was skipped when the state was saved; empty if something was, or it is not known."""
        return str(self.about.get("why", {}).get("families", {}).get(family, ""))


def _frozen(params: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Entries are checked only where the model is known: of others, what can be read."""
    found: dict[str, int] = {}
    for name, entry in params.items():
        blocks = (entry.get("blocks") or {}).get("frozen")
        if isinstance(entry.get("frozen"), int):
            found[name] = entry["frozen"]
        elif isinstance(blocks, torch.Tensor) and (blocks >= 0).any():
            some = int((blocks >= 0).sum())
            found[f"{name} ({some} of {len(blocks)} blocks)"] = int(blocks[blocks >= 0].min())
    return found


def _steps(values: np.ndarray) -> np.ndarray:
    return np.diff(values, prepend=0.0)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.where(np.isnan(whole), np.nan, 0.0), where=whole > 0.0)


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """float [P] of [P, G], over the known ones; NaN where none is."""
    known = np.where(np.isfinite(values), weights if weights.any() else 1.0, 0.0)
    return np.divide((np.nan_to_num(values) * known).sum(1), known.sum(1), out=np.full(len(values), np.nan),
                     where=known.sum(1) > 0.0)  # fmt: skip
