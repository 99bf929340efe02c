"""locate, group and mask together, on random ways from a product to a gradient: the off rows go, and only they."""

import math
import random
from collections import Counter

import pytest
import torch
from tiny import Tiny, aten, param
from torch import fx

from cacompile.passes import group, locate, mark_products, mask_weight_grads
from cacompile.passes.plan import Plan


def factored(size: int, parts: int, rng: random.Random) -> list[int]:
    """A random shape of `size` entries."""
    shape = []
    for _ in range(parts - 1):
        shape.append(rng.choice([d for d in range(1, size + 1) if size % d == 0]))
        size //= shape[-1]
    return [*shape, size]


def view(tiny: Tiny, node: fx.Node, rng: random.Random) -> fx.Node:
    shape = list(node.meta["val"].shape)
    kind = rng.choice(["permute", "reshape", "slice", "select", "cat"])
    if kind == "permute":
        return tiny.call(aten.permute.default, node, rng.sample(range(len(shape)), len(shape)))
    if kind == "reshape":
        return tiny.call(aten.reshape.default, node, factored(math.prod(shape), rng.randint(2, 4), rng))
    dim = rng.randrange(len(shape))
    if kind == "select" and len(shape) < 4:
        zeros = tiny.call(aten.zeros.default, [*shape[:dim], 3, *shape[dim:]])
        return tiny.call(aten.select_scatter.default, zeros, node, dim, rng.randrange(3))
    if kind == "slice":
        zeros = tiny.call(aten.zeros.default, [*shape[:dim], 3 * shape[dim], *shape[dim + 1 :]])
        start = rng.randrange(3) * shape[dim]
        return tiny.call(aten.slice_scatter.default, zeros, node, dim, start, start + shape[dim])
    zeros = tiny.call(aten.zeros.default, shape)
    return tiny.call(aten.cat.default, rng.sample([node, zeros], 2), dim)


def one_case(seed: int) -> str:
    """Masks one random gradient and checks it; says what happened."""
    rng = random.Random(seed)
    tiny = Tiny()
    if rng.random() < 0.5:
        a, b = tiny.input("a", 16, 3), tiny.input("b", 3, 24)
        node = tiny.mm(a, b)
    else:
        a, b = tiny.input("a", 4, 6, 3), tiny.input("b", 4, 3, 8)
        node = tiny.call(aten.bmm.default, a, b)
    for _ in range(rng.randint(1, 4)):
        node = view(tiny, node, rng)
    if len(node.meta["val"].shape) < 2 or node.meta["val"].numel() > 100_000:
        return "no weight"
    gm = tiny.returns(node)
    values = [torch.randint(1, 9, n.meta["val"].shape).float() for n in (a, b)]
    [dense] = gm(*values)
    plan = group(locate(Plan(params=(param(node),))), block_rows=rng.choice([1, 4, 16]))
    if not plan.grads:
        return "dense"
    mark_products(plan)
    assert mask_weight_grads(gm, plan).masked == ("w",)
    flags = torch.randint(0, 2, (len(plan.groups),), dtype=torch.uint8)
    [grad] = plan.grads
    on = flags.bool().repeat_interleave(grad.block)[: dense.shape[grad.dim]]
    expected = dense.movedim(grad.dim, 0).clone()
    expected[~on] = 0
    # small integers: no rounding
    [masked] = gm(*values, flags)
    assert torch.equal(masked.movedim(grad.dim, 0), expected), f"seed {seed}:\n{gm.code}"
    return "masked"


@pytest.mark.parametrize("start", range(0, 600, 100))
def test_random_views(start: int) -> None:
    happened = Counter(one_case(seed) for seed in range(start, start + 100))
    assert happened["masked"] > 20, happened
