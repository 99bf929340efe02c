"""Join slices of parameters into groups that are kept or skipped together. Only looks.

up [F, D]  rows 0:128    ─┐
up bias    entries 0:128  ├─  layers.3.mlp.neurons[0:128]
down [D, F] columns 0:128 ┘
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cacompile.names import Named, family_names, group_name
from cacompile.plan import Family, Param, ParamGroup, Plan, Shared, Skip, Slice, WeightGrad

from .axes import Axis
from .components import THINNEST, Components, Owner, Part, stretch
from .couple import Coupling
from .kin import kin_of

TARGETS = {"filters": 0.5, "tokens": 4.0, "outputs": 4.0}
"""Kind -> rows a block, as a multiple of `block_rows`; 1 for others.

So groups cost about the same: a neuron is a row or a column in two or three weights, a token a row in one alone; a row
of filters has nine taps.
"""


@dataclass
class _Part:
    """A future family: one axis with the slices that it owns."""

    kind: str
    leaf: Axis
    slices: list[tuple[WeightGrad, np.ndarray]] = field(default_factory=list)
    """Weights, and the unit of each row."""
    others: list[tuple[Param, int, np.ndarray]] = field(default_factory=list)
    """The same, with their dimension, of parameters whose gradients cost nothing: biases, norms, embeddings."""
    units: int = 1
    """Units a group."""
    first: int = 0
    """Its first group among all groups of the plan."""

    @property
    def groups(self) -> int:
        return -(-self.leaf.size // self.units)

    @property
    def thickest(self) -> int:
        """Neighbouring rows of one unit in the weight where they are most."""
        runs = [_run(units) * inner_of(grad) for grad, units in self.slices]
        return max(runs, default=1)

    @property
    def least(self) -> int:
        """Units that cannot be parted: the output channels of one convolution group."""
        return max((-(-grad.unit // _run(units)) for grad, units in self.slices), default=1)

    def may_have(self, units: int) -> bool:
        """Whether groups of so many units end where products and indivisible rows of its weights do."""
        for grad, each in self.slices:
            rows = units * _run(each)
            if (np.diff(each) >= 0).all() and (rows % grad.unit or any(edge % rows for edge in edges_of(grad))):
                return False
        return True


def _run(units: np.ndarray) -> int:
    """Length of the first stretch of rows that belong to one unit."""
    start = int(np.argmax(units >= 0))
    return int(np.argmax(np.append(units[start:], -2) != units[start]))


def group(plan: Plan, coupling: Coupling | None = None, *, block_rows: int) -> Plan:
    """Choose along which dimension each gradient is cut, and what belongs together; without a coupling, plain rows.

    A weight for which no dimension of the coupling will do is cut into plain blocks of rows. One whose parts meet where
    no blocks of a useful size can end stays dense.
    """
    components = Components(coupling or Coupling())
    followed = {grad.follows for grad in plan.grads}
    owners: dict[str, list[Owner]] = {
        grad.param.name: _owners(grad, components, grad.param.name in followed)
        for grad in plan.grads
        if not grad.follows
    }
    while True:
        parts = _collect(owners, components)
        _size(parts, block_rows)
        unfit = {name for name, (owner, *_) in owners.items() if not _block(owner, parts, block_rows)}
        unfit -= {name for name, left in owners.items() if len(left) == 1}
        if not unfit:
            break
        for name in unfit:
            del owners[name][0]
    return _plan(plan, {name: left[0] for name, left in owners.items()}, parts, components, block_rows)


def _owners(grad: WeightGrad, components: Components, followed: bool) -> list[Owner]:
    """From the best way to cut a weight to the plainest; one that others follow is cut along the rows they share."""
    candidates = (grad,) if followed else (grad, *grad.others)
    ranked = [o for o in components.owners(candidates) if o.grad is grad or not o.alone]
    rows = np.arange(grad.param.shape[grad.dim])
    return [*ranked, Owner(grad, (Part(Axis(len(rows)), rows),), alone=True)]


_Parts = dict[tuple[Axis, str | None], _Part]
"""By axis; where a weight is alone with its share of the stream, by its name as well."""


def _key(owner: Owner, part: Part) -> tuple[Axis, str | None]:
    return part.leaf, owner.grad.param.name if owner.alone else None


def _collect(owners: dict[str, list[Owner]], components: Components) -> _Parts:
    parts: _Parts = {}
    for owner, *_ in owners.values():
        for part in owner.parts:
            key = _key(owner, part)
            if key not in parts:
                parts[key] = _Part(_kind(owner, part, components), part.leaf)
            parts[key].slices.append((owner.grad, part.units))
    return parts


def _kind(owner: Owner, part: Part, components: Components) -> str:
    if owner.alone:
        return "filters" if owner.grad.kind == "convolution" else "rows"
    kind = components.kind(part.leaf)
    # rows beside others that lead nowhere: keys and values of one head that all queries share
    return "rows" if not kind or (kind == "outputs" and len(owner.parts) > 1) else kind


def _size(parts: _Parts, block_rows: int) -> None:
    """How many units make a group: so many that a kernel's tile is full; a unit is never cut."""
    first = 0
    for part in parts.values():
        if part.kind not in ("experts", "rows") or not any(is_batch(grad) for grad, _ in part.slices):
            target = block_rows * TARGETS.get(part.kind, 1.0)
            most = max(int(target) // part.thickest, part.least)
            part.units = next((n for n in range(most, 0, -1) if part.may_have(n)), most)
        part.first, first = first, first + part.groups


def _labels(owner: Owner, parts: _Parts) -> np.ndarray:
    """int [rows]: the group of each row along the owned dimension; -1 for none."""
    labels = np.full(owner.grad.param.shape[owner.grad.dim], -1)
    for part in owner.parts:
        found = parts[_key(owner, part)]
        inside = part.units >= 0
        labels[inside] = found.first + part.units[inside] // found.units
    return labels


def _block(owner: Owner, parts: _Parts, block_rows: int) -> int:
    """Rows a block, so that no block has rows of two groups, or of two products; 0 if that is too thin."""
    grad, labels = owner.grad, _labels(owner, parts)
    block = stretch(labels, edges_of(grad))
    if block == len(labels):
        return block
    thick = block * inner_of(grad) >= min(THINNEST, max(1, block_rows // 2))
    return block if thick and block % grad.unit == 0 and (labels >= 0).all() else 0


def _plan(plan: Plan, owners: dict[str, Owner], parts: _Parts, components: Components, block_rows: int) -> Plan:
    skips: list[Skip] = []
    blocks: dict[str, int] = {}
    for name, owner in owners.items():
        if not (block := _block(owner, parts, block_rows)):
            grad = owner.grad
            edges = ", ".join(map(str, edges_of(grad)))
            reason = f"its parts meet at rows {edges}, where no blocks of {THINNEST} rows or more end"
            skips.append(Skip(name, grad.kind, reason, grad.flops))
            for part in owner.parts:
                found = parts[_key(owner, part)]
                found.slices = [pair for pair in found.slices if pair[0] is not grad]
        else:
            blocks[name] = block
    followers = [grad for grad in plan.grads if grad.follows]
    for grad in followers:
        if grad.follows not in blocks:
            skips.append(
                Skip(grad.param.name, grad.kind, f"made with the gradient of {grad.follows}, which stays dense")
            )
            continue
        owner = owners[grad.follows]
        for part in owner.parts:
            parts[_key(owner, part)].others.append((grad.param, grad.dim, part.units))
    _add_others(plan, parts, components, {grad.param.name for grad in plan.grads}, block_rows)
    families, groups = _families(parts, components)
    grads: list[WeightGrad] = []
    slot = 0
    for name, block in blocks.items():
        grad = replace(owners[name].grad, block=block, slot=slot, others=())
        labels = _labels(owners[name], parts)[::block]
        grads.append(replace(grad, groups=tuple(map(int, labels))))
        slot += grads[-1].blocks
    made = {grad.param.name: grad for grad in grads}
    for grad in followers:
        if (leader := made.get(grad.follows)) is not None:
            grads.append(replace(grad, block=leader.block, slot=slot, groups=leader.groups))
            slot += leader.blocks
    for grad in grads:
        for label, flops in zip(grad.groups, grad.block_flops):
            groups[label] = replace(groups[label], flops=groups[label].flops + flops)
    return replace(
        plan,
        grads=tuple(grads),
        groups=tuple(groups),
        families=tuple(families),
        axes=_axes(components, [part for part in parts.values() if part.slices or part.others]),
        skips=(*plan.skips, *skips),
        cuts=tuple(components.coupling.cuts.items()),
        nodes=components.coupling.nodes,
    )


def _add_others(plan: Plan, parts: _Parts, components: Components, owned: set[str], block_rows: int) -> None:
    """Biases, norms and other parameters without products of their own, and embeddings: where their axis has groups."""
    layers = {layer.bit: layer for layer in components.coupling.layers}
    for param in plan.params:
        dims = components.coupling.params.get(param.name)
        if param.name in owned or not dims:
            continue
        found = [(d, part) for d, dim in enumerate(dims) for part in components.parts(dim)]
        origin = components.coupling.origins.get(param.name)
        maker = layers.get(origin.nearest) if origin is not None else None
        for alone in [None, *(maker.weights if maker else ())]:
            mine = [(d, part) for d, part in found if (part.leaf, alone) in parts]
            if mine:
                dim = max(mine, key=lambda pair: len(parts[pair[1].leaf, alone].slices))[0]
                for d, part in mine:
                    if d == dim:
                        parts[part.leaf, alone].others.append((param, d, part.units))
                break
        else:
            for d, part in found:
                if part.leaf in components.tokens:
                    units = max(1, int(block_rows * TARGETS["tokens"]))
                    tokens = parts.setdefault((part.leaf, None), _Part("tokens", part.leaf, units=units))
                    tokens.others.append((param, d, part.units))
                    break


def _families(parts: _Parts, components: Components) -> tuple[list[Family], list[ParamGroup]]:
    """Named, in the order of the parameters; sets where each part's groups begin."""
    used = [part for part in parts.values() if part.slices or part.others]
    kin = kin_of(components, [part.leaf for part in used])
    named = [Named(part.kind, _makers(part, components), _weights(part)) for part in used]
    families: list[Family] = []
    groups: list[ParamGroup] = []
    for part, name, about, relatives in zip(used, family_names(named), named, kin):
        part.first = len(groups)
        scale = 1 if part.kind in ("heads", "experts") else _scale(part)
        for start in range(0, part.leaf.size, part.units):
            stop = min(start + part.units, part.leaf.size)
            slices = tuple(_slices(part, start, stop))
            text = group_name(name, start * scale, stop * scale)
            groups.append(ParamGroup(text, start * scale, stop * scale, slices, len(families)))
        families.append(Family(name, part.kind, about.makers, about.weights, relatives))
    return families, groups


def _axes(components: Components, used: Sequence[_Part]) -> tuple[Shared, ...]:
    family = {part.leaf: i for i, part in enumerate(used)}
    return tuple(
        Shared(
            "stream" if leaf in components.streams else components.kind(leaf),
            leaf.size,
            tuple(members),
            family.get(leaf, -1),
        )
        for leaf, members in components.members.items()
        if len(members) > 1 or leaf in family
    )


def _scale(part: _Part) -> int:
    """Rows that one unit is in what makes it, such as channels of one group of a group norm."""
    units = [units for _, units in part.slices] or [units for *_, units in part.others]
    return _run(units[0])


def _weights(part: _Part) -> tuple[str, ...]:
    return tuple(grad.param.name for grad, _ in part.slices) or tuple(param.name for param, *_ in part.others)


def _makers(part: _Part, components: Components) -> tuple[str, ...]:
    made = [name for layer in components.made[part.leaf] for name in sorted(layer.weights)]
    return tuple(name for name in dict.fromkeys(made) if name in _weights(part))


def inner_of(grad: WeightGrad) -> int:
    """Rows or columns of the product that one row of the weight is; of an expert, those of its matrix."""
    return grad.param.shape[1] if is_batch(grad) else min(p.inner for p in grad.products)


def is_batch(grad: WeightGrad) -> bool:
    """Whether it is cut into whole matrices of a batched product."""
    return any(p.kind in ("batched", "grouped") and p.dim == 0 for p in grad.products)


def edges_of(grad: WeightGrad) -> list[int]:
    """Rows at which one product ends and another begins."""
    rows = grad.param.shape[grad.dim]
    return sorted({edge for p in grad.products for edge in (p.lo, p.hi)} - {0, rows})


def _slices(part: _Part, start: int, stop: int) -> Iterable[Slice]:
    weights = [(grad.param.name, grad.dim, units) for grad, units in part.slices]
    for name, dim, units in [*weights, *((param.name, dim, units) for param, dim, units in part.others)]:
        inside = np.concatenate(([False], (units >= start) & (units < stop), [False]))
        edges: Sequence[int] = np.flatnonzero(np.diff(inside.astype(np.int8))).tolist()
        for lo, hi in zip(edges[::2], edges[1::2]):
            yield Slice(name, dim, lo, hi)
