"""Join slices of parameters into groups that are kept or skipped together. Only looks.

up [F, D]  rows 0:128    ─┐
up bias    entries 0:128  ├─  layers.3.mlp.neurons[0:128]
down [D, F] columns 0:128 ┘
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from .coupling.axes import Axis
from .coupling.components import THINNEST, Components, Owner, Part, stretch
from .coupling.walk import Coupling
from .families import name_families, shared_axes
from .kinds import kind_called
from .owned import Owned, edges_of, inner_of, is_batch, run_lengths
from .plan import Plan, Share, StaysDense, WeightGrad

TARGETS = {"filters": 0.5, "tokens": 4.0, "outputs": 4.0}
"""Kind -> rows a block, as a multiple of `block_rows`; 1 for others.

So groups cost about the same: a neuron is a row or a column in two or three weights, a token a row in one alone; a row
of filters has nine taps.
"""


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
    ranked = [o for o in components.owners(candidates) if o.grad is grad or not o.standalone]
    ranked = [way for owner in ranked for way in (owner, _without_thin(owner)) if way is not None]
    rows = np.arange(grad.param.shape[grad.dim])
    return [*ranked, Owner(grad, (Part(Axis(len(rows)), rows),), standalone=True)]


def _without_thin(owner: Owner) -> Owner | None:
    """The same, but where a unit has far fewer rows than elsewhere in the weight, these are rows of their own.

    Such as the one time step for each head beside its many channels: no block of a useful size ends between them.
    """
    inner = inner_of(owner.grad)
    aside = np.zeros(owner.grad.param.shape[owner.grad.dim], dtype=bool)
    parts: list[Part] = []
    for part in owner.parts:
        inside, length = part.units >= 0, run_lengths(part.units)
        thin = inside & (length * inner < THINNEST) & (length < length[inside].max())
        parts.append(Part(part.leaf, np.where(thin, -1, part.units)))
        aside |= thin
    if not aside.any():
        return None
    units = np.where(aside, np.cumsum(aside) - 1, -1)
    return replace(owner, parts=(*parts, Part(Axis(int(aside.sum())), units)))


Key = tuple[Axis, str | None, Share | None]
Parts = dict[Key, Owned]
"""By axis; where a weight is alone with its share of the stream, by its name as well; apart where it is cut up."""


def _key(owner: Owner, part: Part) -> Key:
    name = owner.grad.param.name if owner.standalone else None
    return part.leaf, name, _ends(owner.grad.param.cut_along(owner.grad.dim))


def _ends(cut: Share | None) -> Share | None:
    """What weights that are cut along a common axis have in common, each along a dimension of its own."""
    return None if cut is None else replace(cut, dim=0)


def _collect(owners: dict[str, list[Owner]], components: Components) -> Parts:
    parts: Parts = {}
    for owner, *_ in owners.values():
        for part in owner.parts:
            key = _key(owner, part)
            if key not in parts:
                parts[key] = Owned(_kind(owner, part, components), part.leaf, cut=key[-1])
            parts[key].slices.append((owner.grad, part.units))
    return parts


def _kind(owner: Owner, part: Part, components: Components) -> str:
    if owner.standalone:
        return kind_called(owner.grad.kind).unit_name
    kind = components.kind(part.leaf)
    # rows beside others that lead nowhere: keys and values of one head that all queries share
    return "rows" if not kind or (kind == "outputs" and len(owner.parts) > 1) else kind


def _size(parts: Parts, block_rows: int) -> None:
    """How many units make a group: so many that a kernel's tile is full; a unit is never cut."""
    first = 0
    for part in parts.values():
        if part.kind not in ("experts", "rows") or not any(is_batch(grad) for grad, _ in part.slices):
            target = block_rows * TARGETS.get(part.kind, 1.0)
            most = max(int(target) // part.thickest, part.least)
            part.units = next((n for n in range(most, 0, -1) if part.may_have(n)), most)
        part.first, first = first, first + part.groups


def _labels(owner: Owner, parts: Parts) -> np.ndarray:
    """int [rows]: the group of each row along the owned dimension; -1 for none."""
    labels = np.full(owner.grad.param.shape[owner.grad.dim], -1)
    for part in owner.parts:
        found = parts[_key(owner, part)]
        inside = part.units >= 0
        labels[inside] = found.first + part.units[inside] // found.units
    return labels


def _block(owner: Owner, parts: Parts, block_rows: int) -> int:
    """Rows a block, so that no block has rows of two groups, or of two products; 0 if that is too thin."""
    grad, labels = owner.grad, _labels(owner, parts)
    edges = [*edges_of(grad), *([len(labels)] if grad.param.cut_along(grad.dim) else [])]
    block = stretch(labels, edges)
    if block == len(labels):
        return block
    thick = block * inner_of(grad) >= min(THINNEST, max(1, block_rows // 2))
    return block if thick and block % grad.unit == 0 and (labels >= 0).all() else 0


def _plan(plan: Plan, owners: dict[str, Owner], parts: Parts, components: Components, block_rows: int) -> Plan:
    dense: list[StaysDense] = []
    blocks: dict[str, int] = {}
    for name, owner in owners.items():
        if not (block := _block(owner, parts, block_rows)):
            grad = owner.grad
            edges = ", ".join(map(str, edges_of(grad)))
            reason = f"its parts meet at rows {edges}, where no blocks of {THINNEST} rows or more end"
            dense.append(StaysDense(name, grad.kind, reason, grad.flops))
            for part in owner.parts:
                found = parts[_key(owner, part)]
                found.slices = [pair for pair in found.slices if pair[0] is not grad]
        else:
            blocks[name] = block
    followers = [grad for grad in plan.grads if grad.follows]
    for grad in followers:
        if grad.follows not in blocks:
            dense.append(
                StaysDense(grad.param.name, grad.kind, f"made with the gradient of {grad.follows}, which stays dense")
            )
            continue
        owner = owners[grad.follows]
        for part in owner.parts:
            parts[_key(owner, part)].others.append((grad.param, grad.dim, part.units))
    _add_others(plan, parts, components, {grad.param.name for grad in plan.grads}, block_rows)
    used = [part for part in parts.values() if part.slices or part.others]
    families, groups = name_families(used, components)
    grads: list[WeightGrad] = []
    first_flag = 0
    for name, block in blocks.items():
        grad = replace(owners[name].grad, block=block, first_flag=first_flag, others=())
        labels = _labels(owners[name], parts)[::block]
        grads.append(replace(grad, groups=tuple(map(int, labels))))
        first_flag += grads[-1].blocks
    made = {grad.param.name: grad for grad in grads}
    for grad in followers:
        if (leader := made.get(grad.follows)) is not None:
            grads.append(replace(grad, block=leader.block, first_flag=first_flag, groups=leader.groups))
            first_flag += leader.blocks
    spent: Counter[int] = Counter()
    for grad in grads:
        for label, flops in zip(grad.groups, grad.block_flops):
            spent[label] += flops
    return replace(
        plan,
        grads=tuple(grads),
        groups=tuple(replace(group, flops=spent[i]) for i, group in enumerate(groups)),
        families=tuple(families),
        axes=shared_axes(components, used),
        dense=(*plan.dense, *dense),
        untraced=tuple(components.coupling.untraced.items()),
        nodes=components.coupling.nodes,
    )


def _add_others(plan: Plan, parts: Parts, components: Components, owned: set[str], block_rows: int) -> None:
    """Biases, norms and other parameters without products of their own, and embeddings: where their axis has groups."""
    layers = {layer.bit: layer for layer in components.coupling.layers}
    for param in plan.params:
        dims = components.coupling.params.get(param.name)
        if param.name in owned or not dims:
            continue
        found = [(d, part) for d, dim in enumerate(dims) for part in components.parts(dim)]
        origin = components.coupling.origins.get(param.name)
        maker = layers.get(origin.nearest) if origin is not None else None
        for alone in [None, *sorted(maker.weights if maker else ())]:
            keyed = [(d, part, (part.leaf, alone, _ends(param.cut_along(d)))) for d, part in found]
            mine = [(d, part, key) for d, part, key in keyed if key in parts]
            if mine:
                dim = max(mine, key=lambda each: len(parts[each[2]].slices))[0]
                for d, part, key in mine:
                    if d == dim:
                        parts[key].others.append((param, d, part.units))
                break
        else:
            for d, part in found:
                if part.leaf in components.tokens:
                    units = max(1, int(block_rows * TARGETS["tokens"]))
                    cut = _ends(param.cut_along(d))
                    tokens = parts.setdefault((part.leaf, None, cut), Owned("tokens", part.leaf, units=units, cut=cut))
                    tokens.others.append((param, d, part.units))
                    break
