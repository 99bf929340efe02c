"""One model of the zoo, measured in a process of its own; `benchmarks.zoo` starts it and reads FILE.

    python -m benchmarks.zoo.run MODEL ROUNDS FILE

FILE is written again after each measurement, so that a crash or a time limit loses the rest only.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import math
import statistics
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

import cacompile
from benchmarks.lib.timing import wall_clock
from benchmarks.zoo.models import ZOO, Case, MissingLibrary
from cacompile.explanation.explain import Explanation

OPTIONS = {"block_rows": 32, "warmup_steps": 10**6}
"""Several groups a weight although the models are narrow; no mask but the pinned ones."""
STEPS, PINNED = 6, range(2, 5)
RTOL = 1e-5
"""Of the largest entry: what products of other slices may round differently, in fp32."""


@dataclass
class ZooRow:
    """One row of the table; None is what was not measured."""

    model: str
    source: str
    trains: bool | None = None
    grads_equal: bool | None = None
    coverage: float | None = None
    semantic: float | None = None
    graph_breaks: int | None = None
    analysis_s: float | None = None
    nodes: int | None = None
    compile_ratio: float | None = None


@dataclass
class Result:
    """A row, and what there is to say about it."""

    row: ZooRow
    notes: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def noting(self, what: str, *columns: str) -> Iterator[None]:
        """Let one measurement fail without the others; `columns` that have no figure then are False."""
        try:
            yield
        except Exception as error:
            for column in columns:
                if getattr(self.row, column) is None:
                    setattr(self.row, column, False)
            self.notes.append(f"{what}: {type(error).__name__}: {str(error).strip().split(chr(10))[0][:200]}")


@dataclass
class Step:
    """What one forward and backward gave."""

    loss: Tensor
    grads: dict[str, Tensor | None]


class Arm:
    """A copy of a case's model, compiled; Dynamo forgets all others."""

    def __init__(self, case: Case, backend: str) -> None:
        torch._dynamo.reset()
        self.case = case
        self.model = copy.deepcopy(case.model)
        options = OPTIONS if backend == "convaware" else {}
        self.compiled = torch.compile(self.model, backend=backend, options=options)

    def loss(self) -> Tensor:
        return self.case.loss(self.compiled(*self.case.args, **self.case.kwargs))

    def step(self) -> Step:
        self.model.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        grads = {name: param.grad for name, param in self.model.named_parameters()}
        return Step(loss.detach(), {name: None if grad is None else grad.clone() for name, grad in grads.items()})


def unequal(ours: Step, dense: Step) -> str | None:
    """What first differs in any bit."""
    if not torch.equal(ours.loss, dense.loss):
        return f"loss {ours.loss.item()} != {dense.loss.item()}"
    for name, expected in dense.grads.items():
        actual = ours.grads[name]
        if (actual is None) != (expected is None):
            return f"{name}: one has no gradient"
        if actual is not None and expected is not None and not torch.equal(actual, expected):
            return f"{name}: differs by {_relative(actual, expected):.1e} of its largest entry"
    return None


def unequal_under_mask(model: nn.Module, ours: Step, dense: Step) -> str | None:
    """What first differs by more than rounding where groups are on, or is not zero where they are off."""
    off, scattered = _off(model), _scattered(model)
    for name, expected in dense.grads.items():
        actual = ours.grads[name]
        if (actual is None) != (expected is None):
            return f"{name}: one has no gradient under a mask"
        if actual is None or expected is None:
            continue
        if name in off:
            dim, rows = off[name]
            skipped = actual.movedim(dim, 0)[rows]
            if name not in scattered and skipped.any():
                return f"{name}: rows that are off have a gradient"
            expected = expected.clone()
            expected.movedim(dim, 0)[rows] = skipped
        if (far := _relative(actual, expected)) > max(RTOL, 2 * torch.finfo(expected.dtype).eps):
            return f"{name}: differs by {far:.1e} of its largest entry under a mask"
    return None


def _relative(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).abs().max().item() / (expected.abs().max().item() or 1.0)


def _off(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Parameter -> (dimension, bool for each index of it that is skipped in this step)."""
    found = {}
    for name, param in cacompile.session(model).params.items():
        if (partition := param.partition) is not None:
            on = torch.from_numpy(param.on.copy()).repeat_interleave(partition.block)[: partition.rows]
            found[name] = partition.dim, ~on
    return found


def _scattered(model: nn.Module) -> set[str]:
    """Embeddings' weights: what a tied one has from its look-ups is computed for all rows."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return {name for name, param in model.named_parameters() if id(param) in tables}


def masked(arm: Arm) -> bool:
    """Whether any of its graphs has run a backward that skipped."""
    return any(binding.masked_backwards for binding in cacompile.session(arm.model).bindings)


def trains(arm: Arm) -> str | None:
    """Why the model does not train, half of its groups off for some of the steps; None if it does."""
    session = cacompile.session(arm.model)
    optimizer = torch.optim.AdamW(arm.model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        if step in PINNED:
            session.pin(keep=0.5, seed=0)
        else:
            session.unpin()
        optimizer.zero_grad()
        loss = arm.loss()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not all(map(math.isfinite, losses)):
        return f"losses {losses}"
    return None if losses[-1] < losses[0] else f"loss goes from {losses[0]:.4f} to {losses[-1]:.4f}"


def compile_seconds(case: Case, backend: str) -> float:
    """A first forward and backward with empty caches, after a small compile that sets up what all compiles share."""
    with fresh_cache():
        small = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        warm_up = Arm(Case(small, (torch.ones(4, 8),), {}, torch.sum), backend)
        warm_up.loss().backward()
        arm = Arm(case, backend)
        gc.collect()
        return wall_clock(lambda: arm.loss().backward())


def compile_rounds(case: Case, rounds: int, odd: bool) -> list[dict[str, float]]:
    """Seconds of each backend; who comes first changes from round to round."""
    found = []
    for number in range(rounds):
        order = ("inductor", "convaware") if (number + odd) % 2 else ("convaware", "inductor")
        found.append({backend: compile_seconds(case, backend) for backend in order})
    return found


def describe(result: Result, model: nn.Module, explanation: Explanation) -> None:
    row = result.row
    row.coverage = explanation.coverage
    row.semantic = getattr(explanation, "semantic", math.nan)
    row.nodes = getattr(explanation, "nodes", None)
    seconds: Any = getattr(explanation, "analysis_s", None)
    row.analysis_s = sum(seconds) if isinstance(seconds, (tuple, list)) else seconds
    seen = {found.param for found in explanation.rows if getattr(found, "graph", 0) >= 0}
    if outside := [name for name, p in model.named_parameters() if p.requires_grad and name not in seen]:
        result.notes.append(f"in no compiled graph: {len(outside)} parameters, as {outside[0]}")
    tables = _scattered(model)
    dense = [r for r in explanation.rows if not r.operation and len(r.shape) > 1 and r.param not in tables]
    if dense:
        most = max(dense, key=lambda found: (found.flops, math.prod(found.shape)))
        result.notes.append(f"dense: {len(dense)} of two dimensions or more, as {most.param}: {most.reason}")


def measure(name: str, rounds: int, file: Path) -> None:
    source, make = ZOO[name]
    result = Result(ZooRow(name, source))

    def save() -> None:
        whole = file.with_suffix(".new")
        whole.write_text(json.dumps(asdict(result)))
        whole.replace(file)  # at once: the process may end at any time

    try:
        case = make()
    except MissingLibrary as missing:
        result.notes.append(str(missing))
        return save()
    dense = arm = None
    with result.noting("inductor", "grads_equal"):
        dense = Arm(case, "inductor").step()
    counters.clear()
    with result.noting("convaware", "trains", "grads_equal"):
        arm = Arm(case, "convaware")
        ours = arm.step()
        result.row.graph_breaks = sum(counters["graph_break"].values())
        result.notes += [f"break: {reason.split(chr(10))[0][:120]}" for reason in counters["graph_break"]]
        describe(result, arm.model, cacompile.explain(arm.compiled))
        save()
        if dense is not None:
            cacompile.session(arm.model).pin(keep=0.5, seed=0)
            wrong = unequal(ours, dense) or unequal_under_mask(arm.model, arm.step(), dense)
            result.row.grads_equal = wrong is None
            result.notes += [wrong] if wrong else []
            save()
    if arm is not None and result.row.trains is None:
        with result.noting("training", "trains"):
            why_not = trains(arm)
            result.row.trains = why_not is None
            result.notes += [why_not] if why_not else []
            result.notes += [] if masked(arm) else ["nothing was ever skipped"]
    save()
    with result.noting("compile time"):
        if found := compile_rounds(case, rounds, odd=len(name) % 2 == 1):
            result.row.compile_ratio = statistics.median(r["convaware"] / r["inductor"] for r in found)
            seconds = [f"{statistics.median(r[b] for r in found):.1f} s" for b in ("convaware", "inductor")]
            result.notes.append(f"compiled in {seconds[0]}, by Inductor in {seconds[1]}")
    return save()


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    measure(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
