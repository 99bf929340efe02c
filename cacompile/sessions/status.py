"""Where training stands: what is skipped in this step, what has been saved so far, and why not more."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from cacompile.errors import ConvAwareError, renamed, shown

from .about import frozen_lines
from .session import session
from .why import small_part, why

PREFIX = "convaware/"
"""Of the names of numbers that are logged."""

LOGGED = {
    "skipped_step": "share of the step's FLOPs, forward and backward, that the next step skips, 0 to 1",
    "skipped_dw": "share of its dW FLOPs that the next step skips, 0 to 1",
    "keep": "mean probability of being kept, over all groups, 0 to 1",
    "saved_step": "share of the steps' FLOPs, forward and backward, left out so far, 0 to 1",
    "saved_dw": "share of their dW FLOPs left out so far, 0 to 1",
    "dw_of_step": "share of the steps' FLOPs that dW is, and so the most that can be saved, 0 to 1",
    "saved_flops": "FLOPs left out so far, all of them of dW",
    "step_flops": "FLOPs that forward and backward passes would have spent so far without skipping",
}
"""Numbers of a Status that are logged, and what each says: shares, or amounts, which end in `_flops`."""

_RENAMED = {"skipped_flops": "skipped_dw", "total_flops": "dw_flops"}


class Numbers(dict[str, float]):
    """Numbers to log, by name. What `to_dict` gave before is still there when asked for by its name."""

    def __init__(self, values: dict[str, float], status: Status) -> None:
        super().__init__(values)
        self._status = status

    def __missing__(self, name: str) -> Any:
        if name in _RENAMED:
            renamed(f"Status.to_dict()[{name!r}]", f"[{PREFIX + _RENAMED[name]!r}]")
            return getattr(self._status, _RENAMED[name])
        if name not in {field.name for field in fields(Status)}:
            raise KeyError(name)
        renamed(f"Status.to_dict()[{name!r}]", f"Status.{name}")
        value = getattr(self._status, name)
        return (
            [{f.name: getattr(each, f.name) for f in fields(each)} for each in value] if name == "families" else value
        )


@dataclass(frozen=True, slots=True)
class StatusFamily:
    """Groups of one kind in one layer, in this step."""

    name: str
    groups: int
    skipped: int
    keep: float
    """Mean probability of being kept."""
    why: str = ""
    """Why most of it is computed in every step, pinned or frozen; empty where it is skipped now and then."""


@dataclass(frozen=True, slots=True)
class Status:
    """What `status` found; prints as a table. Shares are 0 to 1, FLOPs counted."""

    step: int
    """Optimizer steps seen."""
    groups: int
    skipped: int
    """Groups whose gradient is not computed in this step."""
    keep: float
    """Mean probability of being kept, over all groups."""
    skipped_step: float
    """Share of the step's FLOPs, forward and backward, that the next step skips."""
    skipped_dw: float
    """Share of its dW FLOPs that the next step skips."""
    saved_flops: float
    """FLOPs left out so far, all of them of dW."""
    dw_flops: float
    """dW FLOPs that a run without skipping would have spent so far."""
    step_flops: float
    """FLOPs that its forward and backward passes would have spent so far, dX and dW."""
    families: tuple[StatusFamily, ...]
    frozen: dict[str, int]
    """Name of a parameter or group that is frozen -> since which step."""
    can: str
    """What can be skipped: `8 of 12 weights can be skipped, from step 20 on`."""
    dw_of_step: float
    """Share of the steps' FLOPs that dW is: the most that can be saved. Before the first step, as compiled."""
    why: str = ""
    """Why nothing is skipped, in a sentence; empty where something is."""
    short: str = ""
    """What of the option budget cannot be saved, in a sentence; empty where it is."""

    @property
    def saved_step(self) -> float:
        """Share of the steps' FLOPs left out so far."""
        return self.saved_flops / self.step_flops if self.step_flops else 0.0

    @property
    def saved_dw(self) -> float:
        """Share of their dW FLOPs left out so far."""
        return self.saved_flops / self.dw_flops if self.dw_flops else 0.0

    def to_dict(self, prefix: str = PREFIX) -> dict[str, float]:
        """Numbers to log, each under `prefix` and its name in `LOGGED`; empty for a model not compiled with us."""
        if not isinstance(prefix, str):
            raise ConvAwareError(f"prefix must be of type str, got {shown(prefix)}")
        return Numbers({prefix + name: getattr(self, name) for name in LOGGED} if self.can else {}, self)

    def __getattr__(self, name: str) -> Any:
        if name not in _RENAMED:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        renamed(f"Status.{name}", f"Status.{_RENAMED[name]}")
        return getattr(self, _RENAMED[name])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """In notebooks and IPython."""
        printer.text(str(self))

    def __str__(self) -> str:
        from tabulate import tabulate  # here, so that training needs torch and numpy alone

        if not self.groups:
            return "\n".join(filter(None, (self.can, self.why)))
        lines = [
            f"step {self.step}: {self.skipped} of {self.groups} groups skipped, {self.skipped_step:.1%} of the step's "
            f"FLOPs ({self.skipped_dw:.1%} of dW); so far {self.saved_step:.1%} of the steps' FLOPs are saved "
            f"({self.saved_dw:.1%} of dW, {self.saved_flops:.3g} of {self.dw_flops:.3g}); "
            f"mean keep probability {self.keep:.3f}",
            self.can,
            small_part(self.dw_of_step, 1.0) if self.dw_of_step else "",
            self.why,
            self.short,
            *frozen_lines(self.frozen),
        ]
        rows = [(f.name, f.groups, f.skipped, f"{f.keep:.3f}", f.why) for f in self.families]
        table = tabulate(rows, headers=["family", "groups", "skipped", "keep", "why not"], disable_numparse=True)
        return "\n".join([*filter(None, lines), *([table] if rows else [])])


def status(model: torch.nn.Module) -> Status:
    """Where training of a convaware model stands; reads host state only, waits for nothing."""
    view = session(model)
    index, bindings, reasons = view.index, view.bindings, why(view)
    names, _ = view.names()
    # a graph whose masked version could not be made computes everything, whatever the mask says
    skippable = {id(param) for binding in bindings for param in binding.skippable}
    off = [~param.on & ~param.frozen_blocks & (id(param) in skippable) for param in index.params]
    skipped = ~index.every(~np.concatenate([np.zeros(0, bool), *off]))
    keep = view.keep.numpy()
    families = tuple(
        StatusFamily(name, int(own.sum()), int(skipped[own].sum()), float(keep[own].mean()), reasons.families[name])
        for i, name in enumerate(names)
        for own in [index.family == i]
    )
    ran = [binding for binding in bindings if binding.spent.backwards] or bindings
    step, dw, left_out = np.sum([binding.in_this_step() for binding in ran], axis=0) if ran else (0.0, 0.0, 0.0)
    total, saved = view.flops
    whole = view.step_flops
    return Status(
        step=view.step_count,
        groups=len(keep),
        skipped=int(skipped.sum()),
        keep=float(keep.mean()) if len(keep) else 1.0,
        skipped_step=float(left_out / step) if step else 0.0,
        skipped_dw=float(left_out / dw) if dw else 0.0,
        saved_flops=saved,
        dw_flops=total,
        step_flops=whole,
        families=families,
        frozen=view.frozen_since,
        can=reasons.line,
        dw_of_step=total / whole if whole else float(dw / step) if step else 0.0,
        why=reasons.nothing,
        short=reasons.short,
    )


def step(model: torch.nn.Module) -> None:
    """Tell that the optimizer has stepped; only for optimizers that are not `torch.optim.Optimizer`s."""
    session(model).step()
