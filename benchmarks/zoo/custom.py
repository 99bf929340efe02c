"""Models of the zoo written here: what einsum, stacked experts and stock torch modules make of a weight gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _weights(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * shape[-2] ** -0.5)


class EinsumAttention(nn.Module):
    """Attention whose projections are one [H, D, hd] weight each, as in code that came from JAX."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        size = width // heads
        self.query, self.key, self.value = (_weights(heads, width, size) for _ in range(3))
        self.out = nn.Parameter(torch.randn(heads, size, width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hde->bhte", x, w) for w in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return torch.einsum("bhte,hed->btd", mixed, self.out)


class EinsumMLP(nn.Module):
    """Two products with [D, F] weights."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = _weights(width, hidden)
        self.down = _weights(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("btd,df->btf", x, self.up))
        return torch.einsum("btf,fd->btd", hidden, self.down)


class EinsumMoE(nn.Module):
    """Experts stacked into one weight; all of them run, the router's top k count."""

    def __init__(self, width: int, hidden: int, experts: int, top: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = _weights(experts, width, hidden)
        self.down = _weights(experts, hidden, width)
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("btd,edf->ebtf", x, self.up))
        return torch.einsum("ebtf,efd,bte->btd", hidden, self.down, top_k_gates(self.router(x), self.top))


class ListMoE(nn.Module):
    """The same routing over an nn.ModuleList of MLPs."""

    def __init__(self, width: int, hidden: int, experts: int, top: int = 2) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)) for _ in range(experts)
        )
        self.top = top

    def forward(self, x: Tensor) -> Tensor:
        gates = top_k_gates(self.router(x), self.top)
        return sum(gates[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


def top_k_gates(logits: Tensor, top: int) -> Tensor:
    """Softmax over the top k of the last dimension, zero elsewhere."""
    best, where = logits.topk(top, dim=-1)
    return torch.zeros_like(logits).scatter(-1, where, best.softmax(dim=-1))


class Residual(nn.Module):
    """x + inner(norm(x))."""

    def __init__(self, width: int, inner: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class TokenModel(nn.Module):
    """Embedding, the given blocks, a head: next-token logits."""

    def __init__(self, width: int, vocabulary: int, *blocks: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(tokens)))


class UNet(nn.Module):
    """Strided convolutions down, transposed ones up, group norm and a skip between."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.stem = _conv(3, channels)
        self.down = _conv(channels, 2 * channels, stride=2)
        self.bottom = _conv(2 * channels, 2 * channels)
        self.up = nn.ConvTranspose2d(2 * channels, channels, 2, stride=2)
        self.join = _conv(2 * channels, channels)
        self.head = nn.Conv2d(channels, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.stem(image)
        coarse = self.up(self.bottom(self.down(fine)))
        return self.head(self.join(torch.cat((fine, coarse), dim=1)))


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(8, outputs), nn.SiLU())


def einsum_transformer(width: int, heads: int, hidden: int, layers: int, vocabulary: int) -> nn.Module:
    parts = [(EinsumAttention(width, heads), EinsumMLP(width, hidden)) for _ in range(layers)]
    return TokenModel(width, vocabulary, *(Residual(width, part) for pair in parts for part in pair))


def mixture(kind: type[nn.Module], width: int, heads: int, hidden: int, experts: int, vocabulary: int) -> nn.Module:
    blocks = (EinsumAttention(width, heads), kind(width, hidden, experts))
    return TokenModel(width, vocabulary, *(Residual(width, block) for block in blocks))


def encoder(width: int, heads: int, hidden: int, layers: int, vocabulary: int) -> nn.Module:
    """torch's own encoder: nn.MultiheadAttention keeps queries, keys and values in one weight."""
    layer = nn.TransformerEncoderLayer(width, heads, hidden, dropout=0.0, batch_first=True)
    return TokenModel(width, vocabulary, nn.TransformerEncoder(layer, layers, enable_nested_tensor=False))


def mlp_chain(width: int, layers: int, classes: int) -> nn.Module:
    hidden = [module for _ in range(layers) for module in (nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(width, classes))
