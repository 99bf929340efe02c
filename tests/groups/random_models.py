"""Small models out of a grammar of layers, and a backend that runs them without compiling kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from cacompile.config import Config
from cacompile.graph.compiled import compile_graph

TIME, VOCABULARY = 4, 40


class Spec(NamedTuple):
    """A block between two widths that are the model's."""

    kind: str
    hidden: int
    variant: int


class Block(nn.Module):
    """What of a spec is done to x [B, T, D]; its parts are made in the order of their names, or the other way round."""

    def __init__(self, spec: Spec, width: int, backwards: bool = False) -> None:
        super().__init__()
        self.spec = spec
        parts = PARTS[spec.kind](spec, width)
        for name in sorted(parts, reverse=backwards):
            setattr(self, name, parts[name]())

    def forward(self, x: Tensor) -> Tensor:
        return FORWARD[self.spec.kind](self, x, self.spec)


Parts = dict[str, Callable[[], nn.Module | nn.Parameter]]


def _linear(inputs: int, outputs: int, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(inputs, outputs, bias=bias)


def _weight(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape) * 0.2)


def _gated_parts(spec: Spec, width: int) -> Parts:
    fused = {"gate": _linear(width, spec.hidden), "up": _linear(width, spec.hidden)}
    return {
        **(fused if spec.variant == 0 else {"both": _linear(width, 2 * spec.hidden)}),
        "down": _linear(spec.hidden, width),
    }


def _gated(m: Any, x: Tensor, spec: Spec) -> Tensor:
    if spec.variant == 0:
        gate, up = m.gate(x), m.up(x)
    elif spec.variant == 1:
        gate, up = m.both(x).chunk(2, -1)
    elif spec.variant == 2:
        gate, up = m.both(x).unflatten(-1, (2, -1)).unbind(-2)
    else:
        gate, up = m.both(x)[..., ::2], m.both(x)[..., 1::2]
    return x + m.down(F.silu(gate) * up)


HEADS, ENTRIES = 4, 4


def _attention_parts(spec: Spec, width: int) -> Parts:
    keys = (HEADS, 2, 1, HEADS)[spec.variant] * ENTRIES
    out = {"out": _linear(HEADS * ENTRIES, width)}
    if spec.variant == 3:
        return {"qkv": _linear(width, 3 * HEADS * ENTRIES, bias=False), **out}
    return {"q": _linear(width, HEADS * ENTRIES), "k": _linear(width, keys), "v": _linear(width, keys), **out}


def _attention(m: Any, x: Tensor, spec: Spec) -> Tensor:
    parts = m.qkv(x).chunk(3, -1) if spec.variant == 3 else (m.q(x), m.k(x), m.v(x))
    q, k, v = (part.unflatten(-1, (-1, ENTRIES)).transpose(1, 2) for part in parts)
    mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != HEADS)
    return x + m.out(mixed.transpose(1, 2).flatten(2))


def _convolution_parts(spec: Spec, width: int) -> Parts:
    middle = {
        0: lambda: nn.Conv1d(spec.hidden, spec.hidden, 3, padding=1, groups=spec.hidden),
        1: lambda: nn.BatchNorm1d(spec.hidden),
        2: lambda: nn.GroupNorm(2, spec.hidden),
        3: lambda: nn.Conv1d(spec.hidden, spec.hidden, 1, groups=2),
    }
    return {
        "first": lambda: nn.Conv1d(width, spec.hidden, 3, padding=1),
        "middle": middle[spec.variant],
        "last": lambda: nn.Conv1d(spec.hidden, width, 1),
    }


def _convolution(m: Any, x: Tensor, spec: Spec) -> Tensor:
    return x + m.last(m.middle(m.first(x.transpose(1, 2))).relu()).transpose(1, 2)


def _branches(m: Any, x: Tensor, spec: Spec) -> Tensor:
    if spec.variant % 2:
        right, left = m.right(x).relu(), m.left(x).tanh()
    else:
        left, right = m.left(x).tanh(), m.right(x).relu()
    return m.join(torch.cat((left, right), -1))


def _einsum(m: Any, x: Tensor, spec: Spec) -> Tensor:
    if spec.variant < 2:
        return x + torch.einsum("btf,fd->btd", torch.einsum("btd,df->btf", x, m.up).relu(), m.down)
    return x + torch.einsum("ebtf,efd->btd", torch.einsum("btd,edf->ebtf", x, m.up).relu(), m.down)


def _einsum_parts(spec: Spec, width: int) -> Parts:
    experts = () if spec.variant < 2 else (3,)
    return {"up": _weight(*experts, width, spec.hidden), "down": _weight(*experts, spec.hidden, width)}


def _sliced(m: Any, x: Tensor, spec: Spec) -> Tensor:
    half = spec.hidden // 2
    return m.down(m.up(x)[..., half:] if spec.variant % 2 else m.up(x)[..., :half].relu())


def _mlp(m: Any, x: Tensor, spec: Spec) -> Tensor:
    return x + m.down(m.norm(F.gelu(m.up(x))))


def _mlp_parts(spec: Spec, width: int) -> Parts:
    norm = (lambda: nn.LayerNorm(spec.hidden)) if spec.variant % 2 else nn.Identity
    return {"up": _linear(width, spec.hidden), "norm": norm, "down": _linear(spec.hidden, width)}


PARTS: Mapping[str, Callable[[Spec, int], Parts]] = {
    "mlp": _mlp_parts,
    "gated": _gated_parts,
    "attention": _attention_parts,
    "convolution": _convolution_parts,
    "branches": lambda spec, width: {
        "left": _linear(width, spec.hidden), "right": _linear(width, 8), "join": _linear(spec.hidden + 8, width)
    },
    "einsum": _einsum_parts,
    "sliced": lambda spec, width: {"up": _linear(width, spec.hidden), "down": _linear(spec.hidden // 2, width)},
    "norm": lambda spec, width: {"norm": lambda: nn.LayerNorm(width)},
    "plain": lambda spec, width: {"linear": _linear(width, width, bias=spec.variant < 2)},
}  # fmt: skip
FORWARD: Mapping[str, Callable[[Any, Tensor, Spec], Tensor]] = {
    "mlp": _mlp,
    "gated": _gated,
    "attention": _attention,
    "convolution": _convolution,
    "branches": _branches,
    "einsum": _einsum,
    "sliced": _sliced,
    "norm": lambda m, x, spec: m.norm(x),
    "plain": lambda m, x, spec: m.linear(x).relu(),
}


class Net(nn.Module):
    """Tokens, blocks, and a head that may be tied to the tokens."""

    def __init__(self, width: int, specs: Sequence[Spec], tied: bool, backwards: bool = False) -> None:
        super().__init__()
        self.specs = specs
        self.embed = nn.Embedding(VOCABULARY, width)
        places = range(len(specs))
        for i in reversed(places) if backwards else places:
            self.add_module(f"block{i}", Block(specs[i], width, backwards))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for i in range(len(self.specs)):
            x = self.get_submodule(f"block{i}")(x)
        return self.head(x)


Drawn = tuple[int, list[Spec], bool]
specs = st.builds(Spec, st.sampled_from(sorted(PARTS)), st.sampled_from([8, 16, 24]), st.integers(0, 3))
nets: st.SearchStrategy[Drawn] = st.tuples(
    st.sampled_from([8, 16]), st.lists(specs, min_size=1, max_size=4), st.booleans()
)


def tokens() -> Tensor:
    return torch.arange(2 * TIME).reshape(2, TIME)


def _interpret(gm: torch.fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
    def run(args: list[Any]) -> Any:
        return torch.fx.Interpreter(gm).boxed_run(args)

    run._boxed_call = True
    return run


def interpreted(model: nn.Module, **options: Any) -> Callable[..., Any]:
    """The model as `torch.compile(model, backend="convaware")` has it, its graphs interpreted."""
    config = Config.from_options(options)[0]

    def backend(gm: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
        region, compiled = compile_graph(gm, inputs, config, {}, compile_inner=_interpret)
        return region.bind(compiled)

    return torch.compile(model, backend=backend)
