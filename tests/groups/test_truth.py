"""Groups of known architectures, written down by hand: every group, every slice, and nothing else.

Blocks of 32 rows: a head of queries fills one, 32 neurons, 16 filters, 128 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import pytest
from zoo_small import CLASSES, EXPERTS, HIDDEN, KEY_HEADS, LAYERS, STAGES, VOCABULARY, WIDTH, explained, slices_of

Slices = set[tuple[str, int, int, int]]
Expected = Iterator[tuple[str, Slices]]
NEURONS, FILTERS, TOKENS = 32, 16, 128


def blocks(size: int, step: int) -> Iterable[tuple[int, int]]:
    return ((start, min(start + step, size)) for start in range(0, size, step))


def family(name: str, size: int, step: int, members: Iterable[tuple[str, int]]) -> Expected:
    """Groups of `step` units, whose slices are these units of each (parameter, dimension)."""
    members = list(members)
    for start, stop in blocks(size, step):
        yield f"{name}[{start}:{stop}]", {(param, dim, start, stop) for param, dim in members}


def gpt2() -> Expected:
    yield from family("transformer.wte.tokens", VOCABULARY, TOKENS, [("transformer.wte.weight", 0)])
    for layer in (f"transformer.h.{i}" for i in range(LAYERS)):
        for head in range(2):
            lo, hi = 32 * head, 32 * head + 32
            fused = [(lo + part * WIDTH, hi + part * WIDTH) for part in range(3)]
            slices = {(f"{layer}.attn.c_attn.weight", 1, *rows) for rows in fused}
            slices |= {(f"{layer}.attn.c_attn.bias", 0, *rows) for rows in fused}
            yield f"{layer}.attn.heads[{head}]", slices | {(f"{layer}.attn.c_proj.weight", 0, lo, hi)}
        members = [("c_fc.weight", 1), ("c_fc.bias", 0), ("c_proj.weight", 0)]
        yield from family(f"{layer}.mlp.neurons", 4 * WIDTH, NEURONS, [(f"{layer}.mlp.{p}", d) for p, d in members])


def grouped_queries(layer: str) -> Expected:
    """One group for each head of keys, with the two heads of queries that it serves."""
    for head in range(KEY_HEADS):
        attention = f"{layer}.self_attn"
        wide, narrow = (32 * head, 32 * head + 32), (16 * head, 16 * head + 16)
        slices = {(f"{attention}.q_proj.weight", 0, *wide), (f"{attention}.o_proj.weight", 1, *wide)}
        slices |= {(f"{attention}.{name}_proj.weight", 0, *narrow) for name in "kv"}
        yield f"{attention}.heads[{head}]", slices


def vocabularies() -> Expected:
    for module in ("model.embed_tokens", "lm_head"):
        yield from family(f"{module}.tokens", VOCABULARY, TOKENS, [(f"{module}.weight", 0)])


def llama() -> Expected:
    yield from vocabularies()
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        yield from grouped_queries(layer)
        members = [("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)]
        members = [(f"{layer}.mlp.{name}.weight", dim) for name, dim in members]
        yield from family(f"{layer}.mlp.neurons", HIDDEN, NEURONS, members)


def mixtral() -> Expected:
    yield from vocabularies()
    for layer in (f"model.layers.{i}" for i in range(LAYERS)):
        yield from grouped_queries(layer)
        yield f"{layer}.mlp.gate.outputs[0:{EXPERTS}]", {(f"{layer}.mlp.gate.weight", 0, 0, EXPERTS)}
        for e in range(EXPERTS):
            names = ("gate_up_proj", "down_proj")
            yield f"{layer}.mlp.experts[{e}]", {(f"{layer}.mlp.experts.{name}", 0, e, e + 1) for name in names}


def normed(conv: str) -> list[tuple[str, int]]:
    """Filters, and the scale and shift that batch norm gives them."""
    return [(f"{conv}.convolution.weight", 0), *((f"{conv}.normalization.{name}", 0) for name in ("weight", "bias"))]


def resnet18() -> Expected:
    """Convolutions are masked by filters alone, so each has its own; its norm goes with it."""
    stem = "resnet.embedder.embedder"
    convolutions = {stem: STAGES[0]}
    for s, width in enumerate(STAGES):
        stage = f"resnet.encoder.stages.{s}.layers"
        convolutions |= {f"{stage}.{i}.layer.{j}": width for i in range(2) for j in range(2)}
        if s:  # from one stage's channels to the next one's
            convolutions[f"{stage}.0.shortcut"] = width
    for conv, width in convolutions.items():
        yield from family(f"{conv}.convolution.filters", width, FILTERS, normed(conv))
    yield f"classifier.1.outputs[0:{CLASSES}]", {(f"classifier.1.{name}", 0, 0, CLASSES) for name in ("weight", "bias")}


@pytest.mark.parametrize("architecture", [gpt2, llama, mixtral, resnet18], ids=lambda f: f.__name__)
def test_groups_are_those_of_the_architecture(architecture: Callable[[], Expected]) -> None:
    found = explained(architecture.__name__)
    assert {group.name: slices_of(group) for group in found.groups} == dict(architecture())
    assert (dict(found.untraced), found.graphs) == ({}, 1)
    assert (found.coverage, found.semantic) == pytest.approx((1.0, 1.0))


def test_experts_in_bf16_are_those_in_fp32() -> None:
    assert {group.name: slices_of(group) for group in explained("mixtral_bf16").groups} == dict(mixtral())


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_layers_are_of_one_kin(name: str) -> None:
    """Heads of all layers alike, neurons alike, the two apart."""
    role_hash: dict[str, set[str]] = {}
    for group in explained(name).groups:
        role_hash.setdefault(group.kind, set()).add(group.role_hash)
    layered = [role_hash[kind] for kind in ("heads", "neurons", "experts") if kind in role_hash]
    assert [len(each) for each in layered] == [1, 1]
    assert layered[0] != layered[1]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_flops_are_shared_out(name: str) -> None:
    found = explained(name)
    assert sum(group.share for group in found.groups) == pytest.approx(found.coverage)
    assert sum(group.flops for group in found.groups) == sum(row.flops for row in found.rows)
