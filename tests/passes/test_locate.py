"""locate: from a gradient back to the products that make it, and where a parameter's rows lie in them."""

from types import SimpleNamespace

import pytest
import torch
from tiny import Tiny, aten, found, located, param, reason, where

from cacompile.passes import locate
from cacompile.passes.plan import Param, Plan


@pytest.mark.parametrize("permutes", [1, 2, 3])
def test_permutes_turn_rows_into_columns(permutes: int) -> None:
    tiny = Tiny()
    node = product = tiny.mm(tiny.input("a", 48, 8), tiny.input("b", 8, 32))
    for _ in range(permutes):
        node = tiny.t(node)
    [found_product] = found(located(node)).products
    assert found_product.node is product and found_product.dim == permutes % 2


def test_cast_keeps_rows() -> None:
    tiny = Tiny()
    product = tiny.mm(tiny.input("a", 48, 8), tiny.input("b", 8, 32))
    cast = tiny.call(torch.ops.prims.convert_element_type.default, tiny.t(product), torch.bfloat16)
    assert where(found(located(cast)).products[0]) == (1, 1, 0, 32)


RESHAPES = {
    # shape of the product, shape of the parameter -> (dim, inner) of its rows, or None
    "unchanged": ([64, 32], [64, 32], (0, 1)),
    "rows were merged with columns": ([64, 32], [4, 16, 32], (0, 16)),
    "filters of a patch embedding": ([64, 48], [64, 3, 4, 4], (0, 1)),
    "leading one": ([64, 32], [1, 64, 32], (0, 1)),
    "rows cannot be seen any more": ([48, 32], [32, 48], None),
}


@pytest.mark.parametrize("name", RESHAPES)
def test_reshape(name: str) -> None:
    before, after, expected = RESHAPES[name]
    tiny = Tiny()
    product = tiny.mm(tiny.input("a", before[0], 8), tiny.input("b", 8, before[1]))
    plan = located(tiny.call(aten.reshape.default, product, after))
    if expected is None:
        assert "rows cannot be followed" in reason(plan)
    elif after[0] == 1:
        assert found(plan).products[0].node is product
    else:
        assert where(found(plan).products[0])[:2] == expected


def test_weight_used_twice_is_masked_in_both_products() -> None:
    tiny = Tiny()
    one = tiny.mm(tiny.input("a", 48, 8), tiny.input("b", 8, 32))
    two = tiny.mm(tiny.input("c", 32, 8), tiny.input("d", 8, 48))
    grad = found(located(tiny.call(aten.add.Tensor, one, tiny.t(two))))
    assert [(p.node, p.dim) for p in grad.products] == [(one, 0), (two, 1)]


def test_tied_embedding_keeps_its_scatter() -> None:
    tiny = Tiny()
    product = tiny.mm(tiny.input("a", 48, 8), tiny.input("b", 8, 32))
    zeros = tiny.call(aten.zeros_like.default, tiny.input("w", 48, 32))
    scatter = tiny.call(aten.index_put.default, zeros, [tiny.input("tokens", 6, dtype=torch.int64)],
                        tiny.input("dy", 6, 32), True)  # fmt: skip
    grad = found(located(tiny.call(aten.add.Tensor, product, scatter)))
    assert [p.node for p in grad.products] == [product]


def test_chunks_joined_by_cat() -> None:
    tiny = Tiny()
    parts = [tiny.mm(tiny.input(f"a{i}", rows, 8), tiny.input(f"b{i}", 8, 32)) for i, rows in enumerate((32, 16))]
    grad = found(located(tiny.call(aten.cat.default, parts)))
    assert [where(p)[2:] for p in grad.products] == [(0, 32), (32, 48)]
    tiny = Tiny()
    parts = [tiny.mm(tiny.input(f"a{i}", 48, 8), tiny.input(f"b{i}", 8, columns)) for i, columns in enumerate((8, 24))]
    grad = found(located(tiny.call(aten.cat.default, parts, -1)))
    assert [where(p) for p in grad.products] == [(0, 1, 0, 48)] * 2


@pytest.mark.parametrize("dim", [0, -2])
def test_slices(dim: int) -> None:
    tiny = Tiny()
    zeros = tiny.call(aten.full.default, [48, 32], 0)
    part = tiny.mm(tiny.input("a", 16, 8), tiny.input("b", 8, 32))
    grad = found(located(tiny.call(aten.slice_scatter.default, zeros, part, dim, 16, 32)))
    assert where(grad.products[0]) == (0, 1, 16, 32)


def test_selected_expert() -> None:
    tiny = Tiny()
    zeros = tiny.call(aten.full.default, [4, 16, 32], 0)
    part = tiny.mm(tiny.input("a", 16, 8), tiny.input("b", 8, 32))
    grad = found(located(tiny.call(aten.select_scatter.default, zeros, part, 0, -1)))
    assert where(grad.products[0]) == (0, 16, 3, 4)


def test_what_stays_says_why() -> None:
    assert "no gradient" in reason(locate(Plan(params=(param(None, 4, 4),))))
    tiny = Tiny()
    assert "one-dimensional" in reason(located(tiny.call(aten.sum.dim_IntList, tiny.input("dy", 8, 32), [0])))
    tiny = Tiny()
    assert "graph's input dy" in reason(located(tiny.call(aten.neg.default, tiny.input("dy", 8, 32))))
    tiny = Tiny()
    assert "constant" in reason(located(tiny.call(aten.full.default, [8, 32], 1)))
    tiny = Tiny()
    assert "aten.exp.default" in reason(located(tiny.call(aten.exp.default, tiny.input("dy", 8, 32))))
    tiny = Tiny()
    scatter = tiny.call(
        aten.embedding_dense_backward.default, tiny.input("dy", 6, 32), tiny.input("i", 6), 8, -1, False
    )
    plan = located(scatter)
    assert "an embedding" in reason(plan) and plan.dense[0].kind == "embedding"


def test_product_with_another_use_stays_and_keeps_its_share_of_flops() -> None:
    tiny = Tiny()
    product = tiny.mm(tiny.input("a", 48, 8), tiny.input("b", 8, 32))
    tiny.call(aten.exp.default, product)
    plan = located(product)
    assert "used 2 times" in reason(plan) and plan.flops == 2 * 48 * 8 * 32 and plan.dense[0].kind == "linear"


@pytest.mark.parametrize(
    ("second", "why"), [("xpu", "no masked operation"), ("cuda:1", "flags of this graph on cuda:0")]
)
def test_weight_on_another_device_stays_dense(second: str, why: str) -> None:
    """One tensor of flags serves a graph, so its masked weights live together."""
    tiny, params = Tiny(), []
    for index, device in enumerate(["cuda:0", second]):
        dw = tiny.mm(tiny.input(f"a{index}", 48, 8), tiny.input(f"b{index}", 8, 32))
        placeholder = tiny.input(f"w{index}", 48, 32)
        placeholder.meta["val"] = SimpleNamespace(device=torch.device(device), dtype=torch.float32)
        params.append(Param(f"w{index}", index, (48, 32), placeholder, dw))
    tiny.returns(*(param.grad for param in params))
    plan = locate(Plan(params=tuple(params)))
    assert [grad.param.name for grad in plan.grads] == ["w0"]
    assert [skip.param for skip in plan.dense] == ["w1"] and why in plan.dense[0].reason


@pytest.mark.parametrize(
    ("dtype", "graphs", "dense"),
    [(torch.bfloat16, True, False), (torch.float64, True, True), (torch.float64, False, False)],
)
def test_what_has_no_kernel_stays_dense_under_cuda_graphs(dtype: torch.dtype, graphs: bool, dense: bool) -> None:
    tiny = Tiny()
    dw = tiny.mm(tiny.input("a", 48, 8, dtype=dtype), tiny.input("b", 8, 32, dtype=dtype))
    placeholder = tiny.input("w", 48, 32)
    placeholder.meta["val"] = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float32)
    tiny.returns(dw)
    plan = locate(Plan(params=(Param("w", 0, (48, 32), placeholder, dw),)), graphs=graphs)
    assert bool(plan.grads) != dense
    assert not dense or "no kernel under CUDA graphs for torch.float64" in plan.dense[0].reason


def test_weights_gathered_for_each_token_are_named_and_counted() -> None:
    tiny = Tiny()
    zeros = tiny.call(aten.full.default, [4, 48, 32], 0)
    outer = tiny.call(aten.mul.Tensor, tiny.input("dy", 10, 48, 1), tiny.input("x", 10, 1, 32))
    ids = [tiny.input("experts", 10, dtype=torch.int64)]
    plan = located(tiny.call(aten.index_put.default, zeros, ids, outer, True))
    assert "gathered for each token" in reason(plan)
    assert (plan.dense[0].kind, plan.flops) == ("gathered", 2 * 10 * 48 * 32)


def test_flops_are_not_sought_behind_what_is_not_understood() -> None:
    tiny = Tiny()
    dx = tiny.mm(tiny.input("a", 48, 8), tiny.input("b", 8, 32))
    plan = located(tiny.call(aten.exp.default, dx))
    assert (plan.dense[0].kind, plan.flops) == ("other", 0)
