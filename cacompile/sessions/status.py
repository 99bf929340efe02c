"""Where training stands: what is skipped in this step, and what has been saved so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from cacompile.state.binding import GraphBinding
from cacompile.state.spent import Totals

from .about import frozen_lines
from .session import session


@dataclass(frozen=True, slots=True)
class StatusFamily:
    """Groups of one kind in one layer, in this step."""

    name: str
    groups: int
    skipped: int
    keep: float
    """Mean probability of being kept."""


@dataclass(frozen=True, slots=True)
class Status:
    """What `status` found; prints as a table."""

    step: int
    """Optimizer steps seen."""
    groups: int
    skipped: int
    """Groups whose gradient is not computed in this step."""
    keep: float
    """Mean probability of being kept, over all groups."""
    skipped_flops: float
    """Share of all dW FLOPs that this step skips, 0 to 1; counted."""
    saved_flops: float
    """dW FLOPs left out so far; counted."""
    total_flops: float
    """dW FLOPs that a dense run would have spent so far; counted."""
    step_flops: float
    """FLOPs that its forward and backward passes would have spent so far, dX and dW; counted."""
    families: tuple[StatusFamily, ...]
    frozen: dict[str, int]
    """Name of a parameter or group that is frozen -> since which step."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        from tabulate import tabulate  # here, so that training needs torch and numpy alone

        share, whole = (self.saved_flops / most if most else 0.0 for most in (self.total_flops, self.step_flops))
        head = (
            f"step {self.step}: {self.skipped} of {self.groups} groups skipped ({self.skipped_flops:.1%} of dW FLOPs), "
            f"mean keep probability {self.keep:.3f}; so far {whole:.1%} of the steps' FLOPs are saved: "
            f"{self.saved_flops:.3g} of {self.total_flops:.3g} dW FLOPs ({share:.1%})"
        )
        head += "".join(f"\n{line}" for line in frozen_lines(self.frozen))
        rows = [(f.name, f.groups, f.skipped, f"{f.keep:.3f}") for f in self.families]
        return f"{head}\n{tabulate(rows, headers=['family', 'groups', 'skipped', 'keep'])}"


def status(model: torch.nn.Module) -> Status:
    """Where training of a convaware model stands; reads host state only, waits for nothing."""
    view = session(model)
    index, bindings = view.index, view.bindings
    names, _ = view.names()
    # a graph whose masked version could not be made computes everything, whatever the mask says
    skippable = {id(param) for binding in bindings for param in binding.skippable}
    off = [~param.on & ~param.frozen_blocks & (id(param) in skippable) for param in index.params]
    skipped = ~index.every(~np.concatenate([np.zeros(0, bool), *off]))
    keep = view.keep.numpy()
    families = tuple(
        StatusFamily(name, int(own.sum()), int(skipped[own].sum()), float(keep[own].mean()))
        for i, name in enumerate(names)
        for own in [index.family == i]
    )
    total, saved = view.flops
    here = Totals.of(view.params.values()).total
    once = here or _flops_of_one_backward(bindings)
    costs = [param.counted_here if here else param.flops for param in index.params]
    left_out = sum(float(cost[blocks].sum()) for cost, blocks in zip(costs, off))
    return Status(
        step=view.step_count,
        groups=len(keep),
        skipped=int(skipped.sum()),
        keep=float(keep.mean()) if len(keep) else 1.0,
        skipped_flops=left_out / once if once else 0.0,
        saved_flops=saved,
        total_flops=total,
        step_flops=view.step_flops,
        families=families,
        frozen=view.frozen_since,
    )


def _flops_of_one_backward(bindings: Sequence[GraphBinding]) -> int:
    """dW FLOPs, as compiled, before anything has run backward.

    By identity, because identical blocks share a layout and so its names.
    """
    most: dict[tuple[int, str], int] = {}
    for binding in bindings:
        inputs = binding.inputs
        for name, flops in binding.layout.flops_by_param:
            key = (id(inputs[name]), "") if name in inputs else (id(binding), name)
            most[key] = max(most.get(key, 0), flops)
    return sum(most.values())


def step(model: torch.nn.Module) -> None:
    """Tell that the optimizer has stepped; only for optimizers that are not `torch.optim.Optimizer`s."""
    session(model).step()
