"""What is known of a model: parameters, groups, axes, and the graphs that all this was read from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal

from cacompile.errors import ConvAwareError, renamed, shown
from cacompile.pages.numbers import count
from cacompile.passes.plan import SharedAxis, Slice
from cacompile.sessions.why import small_part

from .fold import fold, fold_name, pattern
from .graphs import Graphs

Kind = Literal["neurons", "heads", "filters", "experts", "tokens", "outputs", "rows"]
"""Of groups; rows where the graph does not say what they are."""


@dataclass(frozen=True, slots=True)
class ExplainedParam:
    """What is known of one parameter in one compiled graph."""

    graph: int
    """Which compiled graph; -1 for none."""
    param: str
    shape: tuple[int, ...]
    kind: str
    """linear, batched, grouped, convolution, embedding, gathered, vector or other."""
    nodes: tuple[str, ...]
    """Nodes of the joint graph that compute its gradient."""
    flops: int
    """dW FLOPs of one backward; counted."""
    share: float
    """Of all dW FLOPs, 0 to 1."""
    counted: bool
    """Whether these FLOPs are all of its own; false in no compiled graph, and for products that nobody can look at."""
    blocks: int
    block: int
    """Rows a block."""
    along: str
    """Which way it is partitioned: the dimension that its blocks lie along, such as `rows`, or empty."""
    families: tuple[str, ...]
    """Families of groups that its blocks belong to."""
    operation: str
    """What replaces the product when something is skipped; empty if it stays dense."""
    reason: str
    """Why it stays dense; empty if it does not."""
    frozen: int = -1
    """The optimizer step after which `session.freeze` froze it as a whole; -1: it is trained."""

    @property
    def fate(self) -> str:
        """What becomes of its gradient: the masked operation, or why it stays dense; None, while it is frozen."""
        if self.frozen >= 0:
            return f"frozen since step {self.frozen}"
        return self.operation or f"dense: {self.reason}"

    @property
    def share_text(self) -> str:
        """`12.5%`, `at least 12.5%`, or `?`."""
        if not self.counted:
            return f"at least {self.share:.1%}" if self.flops else "?"
        return f"{self.share:.1%}"


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of one step of the compiled graphs; counted, no farther down than their backwards go while frozen."""

    forward: int
    dx: int
    dw: int

    @property
    def total(self) -> int:
        return self.forward + self.dx + self.dw

    @property
    def text(self) -> str:
        """`forward 33.4%, dX 33.3%, dW 33.3%`."""
        parts = {"forward": self.forward, "dX": self.dx, "dW": self.dw}
        return ", ".join(f"{name} {part / (self.total or 1):.1%}" for name, part in parts.items())


@dataclass(frozen=True, slots=True)
class Uncounted:
    """Weights whose FLOPs are in no total, as far as they are unknown."""

    params: tuple[str, ...]
    elements: int
    """Entries of all of them."""

    @classmethod
    def of(cls, rows: Iterable[ExplainedParam]) -> Uncounted:
        shapes = {row.param: row.shape for row in rows}
        return cls(tuple(shapes), sum(map(math.prod, shapes.values())))

    @property
    def text(self) -> str:
        """`2 weights with 4,160 parameters (b.weight, b.bias)`, layers that repeat named once."""
        names = ", ".join(map(fold_name, fold(self.params, pattern)))
        return f"{count(len(self.params), 'weight')} with {self.elements:,} parameters ({names})"


@dataclass(frozen=True, slots=True)
class ExplainedGroup:
    """Slices of parameters that are kept or skipped together."""

    name: str
    """`layers.3.mlp.neurons[0:128]`."""
    family: str
    """`layers.3.mlp.neurons`: groups of one kind in one layer."""
    kind: Kind
    """What its units are; rows where the graph does not say what they are."""
    role_hash: str
    """Equal for the same kind in other layers."""
    slices: tuple[Slice, ...]
    """Weights first, then what goes with them and is always computed: biases, norms, embeddings, what stays dense."""
    flops: int
    """dW FLOPs of one backward; counted. 0: nothing of it is ever skipped."""
    share: float
    """Of all dW FLOPs, 0 to 1."""

    @property
    def kin(self) -> str:
        renamed("Group.kin", "ExplainedGroup.role_hash")
        return self.role_hash


@dataclass(frozen=True, slots=True)
class Context:
    """What one graph's notes need to know of the whole model."""

    graphs: Graphs
    count: int
    """Graphs of the model."""
    total: int
    """dW FLOPs of the model."""
    families: Mapping[str, tuple[str, ...]]
    """Parameter -> the families that it has groups in."""


DOCUMENTED = (
    "graphs", "nodes", "step", "coverage", "semantic", "outside", "uncounted", "untraced", "rows", "groups", "axes",
    "families",
)  # fmt: skip
"""What a Document has of Facts, under the same names."""


def to_plain(value: Any) -> Any:
    """Dataclasses as dictionaries, lists for tuples of them."""
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, tuple):
        return list(map(to_plain, value))
    return dict(value) if isinstance(value, Mapping) else value


@dataclass(frozen=True, slots=True)
class Facts:
    """All that is known of a model."""

    rows: tuple[ExplainedParam, ...]
    graphs: int
    """Compiled graphs."""
    groups: tuple[ExplainedGroup, ...]
    """What is kept or skipped together; skipped are those with FLOPs."""
    axes: tuple[SharedAxis, ...]
    """Axes that dimensions of parameters have in common: the coupling graph. `family` counts among `families`."""
    families: tuple[str, ...]
    """Names of the families, graph by graph."""
    untraced: Mapping[str, int]
    """Operations through which the meaning of dimensions could not be followed, and how often."""
    nodes: int
    """Nodes of the joint graphs."""
    analysis_s: float
    """Seconds that it took to analyse them."""
    traced: tuple[Graphs | None, ...] = field(default=(), repr=False, compare=False)
    """The graphs themselves; None in an explanation that was pickled."""

    step: StepFlops = StepFlops(0, 0, 0)
    ways_down: tuple[str, ...] = ()
    """Where the backward of each graph ends while something of it is frozen, in words."""

    @property
    def cuts(self) -> Mapping[str, int]:
        renamed("Explanation.cuts", "Explanation.untraced")
        return self.untraced

    @property
    def coverage(self) -> float:
        """Share of the compiled graphs' dW FLOPs that masked operations compute, 0 to 1; see `outside`, `uncounted`."""
        return min(1.0, math.fsum(row.share for row in self.rows if row.operation))

    @property
    def coverage_of_step(self) -> float:
        """Share of a step's FLOPs, forward and backward, that masked operations compute, 0 to 1: what can be saved."""
        found = {(row.graph, row.param): row.flops for row in self.rows if row.operation and row.frozen < 0}
        return min(1.0, sum(found.values()) / self.step.total) if self.step.total else 0.0

    @property
    def counted_of(self) -> str:
        """What coverage is a share of: `dW FLOPs`, where there are no others."""
        return "the compiled graphs' dW FLOPs" if self.outside.params else "dW FLOPs"

    @property
    def outside(self) -> Uncounted:
        """What is in no compiled graph that has run: `coverage` knows nothing of it."""
        return Uncounted.of(row for row in self.rows if row.graph < 0)

    @property
    def uncounted(self) -> Uncounted:
        """What is made, all or in part, inside operations that nobody can look into: `coverage` is too high by it."""
        return Uncounted.of(row for row in self.rows if row.graph >= 0 and not row.counted)

    @property
    def beyond(self) -> list[str]:
        """What coverage does not count, in words; empty where it counts everything."""
        texts = []
        if self.outside.params:
            texts.append(
                f"outside of compiled graphs: {self.outside.text}; "
                "they run in eager mode, or have not run yet, and their share of dW FLOPs is not known"
            )
        if self.uncounted.params:
            texts.append(
                f"not counted: at least {self.uncounted.text}, made inside operations that nobody can look into; "
                "coverage is lower by their share"
            )
        return texts

    @property
    def masked(self) -> int:
        """Parameters, of each graph, that can be skipped."""
        return sum(bool(row.operation) for row in self.rows)

    @property
    def summary(self) -> list[str]:
        """What stands below a table of parameters."""
        lines = [
            f"{self.masked} of {len(self.rows)} parameters masked: {self.coverage_of_step:.1%} of a step's FLOPs "
            f"({self.step.text}), {self.coverage:.1%} of {self.counted_of} (counted), {self.semantic:.1%} of those in "
            f"groups with a meaning, {count(len(self.families), 'family', 'families')}, {count(self.graphs, 'graph')}"
        ]
        if not self.rows:
            lines.append("nothing is trained: no parameter requires a gradient")
        if warning := small_part(self.step.dw, self.step.total):
            lines.append(warning)
        lines += [*self.ways_down, *self.beyond]
        if self.untraced:
            ends = ", ".join(f"{reason} ({times}x)" for reason, times in self.untraced.items())
            lines.append(f"groups end at: {ends}")
        return lines

    @property
    def semantic(self) -> float:
        """Share of masked dW FLOPs in groups that mean something (not plain rows), 0 to 1."""
        masked = {row.param for row in self.rows if row.operation}
        groups = [g for g in self.groups if any(piece.param in masked for piece in g.slices)]
        total = sum(group.flops for group in groups)
        return sum(group.flops for group in groups if group.kind != "rows") / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values of all that JSON has too, but for versions and products."""
        return {name: to_plain(getattr(self, name)) for name in DOCUMENTED}

    @property
    def dearest(self) -> int:
        """The graph in which most dW FLOPs can be skipped; 0 where there is none."""
        flops = [sum(row.flops for row in self.rows if row.graph == i and row.operation) for i in range(self.graphs)]
        return flops.index(max(flops)) if flops else 0

    def context(self, graph: int) -> Context:
        """What notes on one of the graphs need to know of the model."""
        if isinstance(graph, bool) or not isinstance(graph, int) or not 0 <= graph < len(self.traced):
            raise ConvAwareError(f"graph must be an int from 0 to {len(self.traced) - 1}, got {shown(graph)}")
        graphs = self.traced[graph]
        if graphs is None:
            raise ConvAwareError("this explanation has no graphs any more, as after pickling; explain the model again")
        total = sum(each.plan.flops for each in self.traced if each is not None) or 1
        return Context(graphs, len(self.traced), total, {row.param: row.families for row in self.rows})
