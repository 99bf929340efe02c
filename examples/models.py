"""Three small models that learn something real on a CPU: a character GPT, ResNet-8 and an MLP."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal self-attention on (batch, time, width); the rows of `qkv` are queries, then keys, then values."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a GELU MLP four times as wide."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Decoder over characters: tokens long (batch, time <= context) to logits (batch, time, symbols)."""

    def __init__(
        self, symbols: int, *, width: int = 256, depth: int = 4, heads: int = 4, context: int = 64, tied: bool = False
    ):
        super().__init__()
        self.token = nn.Embedding(symbols, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:  # what writes into the residual stream starts smaller, as in GPT-2
                residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * depth) ** 0.5 if residual else 0.02)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Residual(nn.Module):
    """Two 3x3 convolutions with batch norm; where the shape changes, a 1x1 convolution on the short cut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.short = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(inner)) + self.short(x))


class ResNet8(nn.Module):
    """CIFAR-style ResNet-8, widths 16, 32, 64 x `width`: grey images (batch, 1, 28, 28) to logits (batch, classes)."""

    def __init__(self, classes: int = 10, *, width: float = 1):
        super().__init__()
        small, middle, large = (round(channels * width) for channels in (16, 32, 64))
        self.stem = nn.Conv2d(1, small, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(small)
        self.stages = nn.Sequential(Residual(small, small, 1), Residual(small, middle, 2), Residual(middle, large, 2))
        self.head = nn.Linear(large, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stages(F.relu(self.norm(self.stem(images))))
        return self.head(x.mean(dim=(2, 3)))


class MLP(nn.Module):
    """Linear layers of the given sizes with ReLU between them: (batch, sizes[0]) to (batch, sizes[-1])."""

    def __init__(self, *sizes: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = torch.relu(layer(x))
        return last(x)
