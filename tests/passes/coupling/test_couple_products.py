"""couple: which dimensions of which parameters are one after convolutions, attention and operations nobody knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from coupled import Case, check, couplings, explained
from torch import Tensor

B, T, PIXELS = 2, 5, 4


def images(m: Any, x: Tensor) -> Tensor:
    return F.conv2d(x, m.a, padding=1)


def then(step: Callable[[Any, Tensor], Tensor], expected: str, **shapes: tuple[int, ...]) -> Case:
    """A convolution with 8 filters, a step, and a convolution `b` that reads what the step makes."""
    return Case(
        lambda m, x: F.conv2d(step(m, images(m, x)), m.b), {"a": (8, 3, 3, 3), "b": (6, 8, 1, 1), **shapes}, expected
    )


FILTERS: dict[str, Case] = {
    "pooled": then(lambda m, x: F.max_pool2d(x, 2), "8: a.0 b.1"),
    "averaged": then(lambda m, x: F.avg_pool2d(x, 2), "8: a.0 b.1"),
    "pooled to one": then(lambda m, x: F.adaptive_avg_pool2d(x, 1), "8: a.0 b.1"),
    "enlarged": then(lambda m, x: F.interpolate(x, scale_factor=2.0), "8: a.0 b.1"),
    "enlarged smoothly": then(lambda m, x: F.interpolate(x, scale_factor=2.0, mode="bilinear"), "8: a.0 b.1"),
    "padded": then(lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"), "8: a.0 b.1"),
    "bias": then(lambda m, x: x + m.bias.view(-1, 1, 1), "8: a.0 bias.0 b.1", bias=(8,)),
    "batch norm": then(lambda m, x: F.batch_norm(x, None, None, m.scale, m.shift, training=True),
                       "8: a.0 scale.0 shift.0 b.1", scale=(8,), shift=(8,)),
    "group norm": then(lambda m, x: F.group_norm(x, 4, m.scale, m.shift),
                       "4: a.0 scale.0 shift.0 b.1 | 2: a.0 scale.0 shift.0 b.1", scale=(8,), shift=(8,)),
    "norm over channels last": then(
        lambda m, x: F.layer_norm(x.permute(0, 2, 3, 1), (8,), m.scale).permute(0, 3, 1, 2),
        "8: a.0 scale.0 b.1", scale=(8,)),
    "squeeze and excite": then(
        lambda m, x: x * F.conv2d(F.conv2d(x.mean((2, 3), keepdim=True), m.down).relu(), m.up).sigmoid(),
        "8: a.0 down.1 up.0 b.1 | 2: down.0 up.1", down=(2, 8, 1, 1), up=(8, 2, 1, 1)),
    "depthwise": then(lambda m, x: F.conv2d(x, m.g, groups=8), "8: a.0 g.0 b.1", g=(8, 1, 3, 3)),
    "two groups": then(lambda m, x: F.conv2d(x, m.g, groups=2), "2: a.0 g.0 b.1 | 4: a.0 g.1 | 4: g.0 b.1",
                       g=(8, 4, 3, 3)),
    "two a channel": then(lambda m, x: F.conv2d(x, m.g, groups=8).unflatten(1, (8, 2)).sum(2), "8: a.0 g.0 b.1",
                          g=(16, 1, 3, 3)),
    "transposed": then(lambda m, x: F.conv_transpose2d(x, m.t), "8: a.0 t.0 | 8: t.1 b.1", t=(8, 8, 2, 2)),
    "transposed in groups": then(lambda m, x: F.conv_transpose2d(x, m.t, groups=2),
                                 "2: a.0 t.0 b.1 | 4: a.0 t.0 | 4: t.1 b.1", t=(8, 4, 2, 2)),
    "joined with another": then(lambda m, x: torch.cat((x[:, :2], F.conv2d(x, m.c)), 1),
                                "2: a.0 b.1 c.1 | 6: a.0 c.1 | 6: b.1 c.0", c=(6, 8, 1, 1)),
    "pixels to channels": then(lambda m, x: F.conv2d(F.pixel_shuffle(x, 2), m.c), "2: a.0 c.1 | 8: c.0 b.1",
                               c=(8, 2, 3, 3)),
    "channels shuffled": then(lambda m, x: x.unflatten(1, (2, 4)).transpose(1, 2).flatten(1, 2),
                              "2: a.0 b.1 | 4: a.0 b.1"),
    "residual": then(lambda m, x: x + F.conv2d(x, m.c, padding=1).relu(), "8: a.0 c.0 c.1 b.1", c=(8, 8, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("case", FILTERS.values(), ids=FILTERS.keys())
def test_filters(case: Case) -> None:
    check(case, torch.rand(B, 3, PIXELS, PIXELS))


def test_an_image_made_flat() -> None:
    case = Case(lambda m, x: images(m, x).flatten(1) @ m.w, {"a": (8, 3, 3, 3), "w": (8 * 16, 5)}, "8: a.0 w.0")
    check(case, torch.rand(B, 3, PIXELS, PIXELS))


D = 6


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Written out, for [B, H, T, E]; back to [B, T, H * E]."""
    scores = q @ k.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def separate(m: Any, x: Tensor) -> Tensor:
    return attention(heads(x @ m.q, 4), heads(x @ m.k, 4), heads(x @ m.v, 4)) @ m.o


def fused_chunk(m: Any, x: Tensor) -> Tensor:
    return attention(*[heads(part, 4) for part in (x @ m.qkv).chunk(3, -1)]) @ m.o


def fused_reshape(m: Any, x: Tensor) -> Tensor:
    return attention(*(x @ m.qkv).view(B, T, 3, 4, 3).permute(2, 0, 3, 1, 4).unbind(0)) @ m.o


def fused_heads_first(m: Any, x: Tensor) -> Tensor:
    return attention(*[part.transpose(1, 2) for part in (x @ m.qkv).view(B, T, 4, 9).chunk(3, -1)]) @ m.o


def grouped(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(x @ m.q, 4), heads(x @ m.k, 2), heads(x @ m.v, 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2) @ m.o


def repeated(m: Any, x: Tensor) -> Tensor:
    q, k, v = heads(x @ m.q, 4), heads(x @ m.k, 2), heads(x @ m.v, 2)
    k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).flatten(1, 2) for part in (k, v))
    return attention(q, k, v) @ m.o


def one_key(m: Any, x: Tensor) -> Tensor:
    return attention(heads(x @ m.q, 4), heads(x @ m.k, 1), heads(x @ m.v, 1)) @ m.o


def einsums(m: Any, x: Tensor) -> Tensor:
    q, k, v = (torch.einsum("btd,hde->bhte", x, w) for w in (m.q, m.k, m.v))
    return torch.einsum("bhte,hed->btd", F.scaled_dot_product_attention(q, k, v), m.o)


GROUPED = "6: q.0 k.0 v.0 | 2: q.1 k.1 v.1 o.0 | 2: q.1 o.0 | 3: q.1 k.1 | 5: v.1 o.0"
FUSED = {"qkv": (D, 36), "o": (12, 7)}
ATTENTION: dict[str, Case] = {
    "separate": Case(separate, {"q": (D, 12), "k": (D, 12), "v": (D, 20), "o": (20, 7)},
                     "6: q.0 k.0 v.0 | 4: q.1 k.1 v.1 o.0 | 3: q.1 k.1 | 5: v.1 o.0"),
    # queries and keys share their entries, values theirs with what reads them
    "fused, in chunks": Case(fused_chunk, FUSED, "4: qkv.1 o.0 | 3: qkv.1 o.0"),
    "fused, by heads": Case(fused_heads_first, FUSED, "4: qkv.1 o.0 | 3: qkv.1 o.0"),
    # one leaf for three rows: the entries of queries, keys and values are one
    "fused, reshaped": Case(fused_reshape, FUSED, "4: qkv.1 o.0 | 3: qkv.1 o.0"),
    "fewer keys": Case(grouped, {"q": (D, 12), "k": (D, 6), "v": (D, 10), "o": (20, 7)}, GROUPED),
    "fewer keys, repeated": Case(repeated, {"q": (D, 12), "k": (D, 6), "v": (D, 10), "o": (20, 7)}, GROUPED),
    "one key": Case(one_key, {"q": (D, 12), "k": (D, 3), "v": (D, 5), "o": (20, 7)},
                    "6: q.0 k.0 v.0 | 4: q.1 o.0 | 3: q.1 k.1 | 5: v.1 o.0"),
    "einsums": Case(einsums, {"q": (4, D, 3), "k": (4, D, 3), "v": (4, D, 5), "o": (4, 5, 7)},
                    "6: q.1 k.1 v.1 | 4: q.0 k.0 v.0 o.0 | 3: q.2 k.2 | 5: v.2 o.1"),
}  # fmt: skip


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION.keys())
def test_heads(case: Case) -> None:
    check(case, torch.rand(B, T, D))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def rotary(m: Any, x: Tensor) -> Tensor:
    angles = torch.arange(T)[:, None] * torch.tensor(0.1) ** torch.arange(4)
    both = angles.cos(), angles.sin()
    for q, k, v, o in ((m.q, m.k, m.v, m.o), (m.q2, m.k2, m.v2, m.o2)):
        x = attention(turned(heads(x @ q, 4), *both), turned(heads(x @ k, 4), *both), heads(x @ v, 4)) @ o
    return x


def shared_bias(m: Any, x: Tensor) -> Tensor:
    near = (torch.arange(T)[:, None] - torch.arange(T)).abs().clamp(max=3)
    bias = F.embedding(near, m.bias).permute(2, 0, 1)[None]
    for q, k, v, o in ((m.q, m.k, m.v, m.o), (m.q2, m.k2, m.v2, m.o2)):
        x = attention(heads(x @ q, 4), heads(x @ k, 4), heads(x @ v, 4), bias) @ o
    return x


def of_layer(number: str, entries: str) -> str:
    """What the attention of one layer couples: heads, and entries of queries and of values."""
    q, k, v, o = (f"{name}{number}" for name in "qkvo")
    return f"4: {q}.1 {k}.1 {v}.1 {o}.0 | {entries.format(q=q, k=k)} | 5: {v}.1 {o}.0"


def layers(size: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"q": (D, 4 * size), "k": (D, 4 * size), "v": (D, 20), "o": (20, D)}
    return shapes | {f"{name}2": shape for name, shape in shapes.items()}


BETWEEN = "6: q.0 k.0 v.0 | 6: q2.0 k2.0 v2.0 o.1"


def test_angles_shared_by_layers_do_not_couple_them() -> None:
    each = "2: {q}.1 {k}.1"
    check(Case(rotary, layers(4), f"{BETWEEN} | {of_layer('', each)} | {of_layer('2', each)}"), torch.rand(B, T, D))


def test_position_biases_shared_by_layers_do_not_couple_them() -> None:
    each = "3: {q}.1 {k}.1"
    case = Case(shared_bias, {"bias": (4, 4), **layers(3)}, f"{BETWEEN} | {of_layer('', each)} | {of_layer('2', each)}")
    check(case, torch.rand(B, T, D))


def batched_experts(m: Any, x: Tensor) -> Tensor:
    tokens = x.flatten(0, 1).expand(4, -1, -1)
    return torch.baddbmm(m.bias[:, None], torch.bmm(tokens, m.up).relu(), m.down)


def grouped_experts(m: Any, x: Tensor) -> Tensor:
    ends = torch.arange(1, 3, dtype=torch.int32) * 16
    up, down = m.up.bfloat16(), m.down.bfloat16()
    return torch._grouped_mm(F.silu(torch._grouped_mm(x.bfloat16(), up, offs=ends)), down, offs=ends)


def test_experts_in_one_batch() -> None:
    case = Case(
        batched_experts,
        {"up": (4, 6, 8), "down": (4, 8, 7), "bias": (4, 7)},
        "4: up.0 down.0 bias.0 | 8: up.2 down.1 | 7: down.2 bias.1",
    )
    check(case, torch.rand(B, T, 6))


def test_experts_by_group() -> None:
    case = Case(grouped_experts, {"up": (2, 16, 32), "down": (2, 32, 8)}, "2: up.0 down.0 | 32: up.2 down.1")
    check(case, torch.rand(32, 16))


@torch.library.custom_op("cacompile_tests::mystery", mutates_args=())
def mystery(x: Tensor) -> Tensor:
    return x.clone()


mystery.register_fake(torch.empty_like)
mystery.register_autograd(lambda _, grad: grad, setup_context=lambda ctx, inputs, output: None)


def test_an_unknown_operation_cuts_and_is_named() -> None:
    found = explained(Case(lambda m, x: mystery(x @ m.a) @ m.b, {"a": (6, 8), "b": (8, 3)}, ""), torch.rand(B, T, 6))
    assert couplings(found) == []
    assert dict(found.untraced) == {"cacompile_tests.mystery.default is not known": 1}
    assert "groups end at: cacompile_tests.mystery" in str(found)
    # what a cut leads to may be anything: no neurons, no outputs
    assert {group.kind for group in found.groups if group.slices[0].param == "a"} == {"rows"}
