"""Whole models for step times, written plainly: GPT-2, a Llama, ResNet-50 and ViT; each call gives the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Attention over (batch, time, heads, size), heads side by side in the result; `k`, `v` may have fewer heads."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    if k.shape[1] != q.shape[1]:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], 1) for part in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Pre-norm transformer block as in GPT-2 and ViT: one product for q, k, v, a GELU MLP four times as wide."""

    def __init__(self, width: int, heads: int, *, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(attend(q, k, v, causal=self.causal))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2: learned positions, the head tied to the embedding; the vocabulary padded to a multiple of 128."""

    def __init__(self, width: int, depth: int, heads: int, *, symbols: int = 50304, context: int = 1024):
        super().__init__()
        self.token, self.position = nn.Embedding(symbols, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, symbols, bias=False)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class LlamaBlock(nn.Module):
    """RMS norms, grouped-query attention with rotary positions, SwiGLU; no biases."""

    def __init__(self, width: int, heads: int, key_heads: int, hidden: int):
        super().__init__()
        self.size = width // heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, key_heads * self.size, bias=False)
        self.v = nn.Linear(width, key_heads * self.size, bias=False)
        self.gate, self.up = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (project(y).unflatten(-1, (-1, self.size)) for project in (self.q, self.k, self.v))
        x = x + self.out(attend(rotated(q, cos, sin), rotated(k, cos, sin), v, causal=True))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on (batch, time, heads, size); cos, sin: (time, 1, size / 2)."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


class Llama(nn.Module):
    """Llama 3.2's shape by default: 1.24 B parameters, the head tied to the embedding."""

    def __init__(
        self,
        width: int = 2048,
        depth: int = 16,
        heads: int = 32,
        key_heads: int = 8,
        hidden: int = 8192,
        *,
        symbols: int = 128256,
        context: int = 2048,
    ):
        super().__init__()
        self.token = nn.Embedding(symbols, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, heads, key_heads, hidden) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.head = nn.Linear(width, symbols, bias=False)
        self.head.weight = self.token.weight
        rates = 500000.0 ** -torch.linspace(0, 1, width // heads // 2 + 1)[:-1]
        angles = torch.outer(torch.arange(context), rates).unsqueeze(1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.token(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1).float(), targets.flatten())


class ViT(nn.Module):
    """Vision transformer over patches, mean-pooled: images (batch, 3, side, side) and their classes."""

    def __init__(self, width: int, depth: int, heads: int, *, side: int = 224, patch: int = 16, classes: int = 1000):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.empty((side // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x).mean(1)).float(), classes)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with batch norm; a 1x1 convolution on the short cut where the shape changes."""

    def __init__(self, inputs: int, inner: int, stride: int):
        super().__init__()
        outputs = 4 * inner
        self.conv1, self.norm1 = nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.short = nn.Identity()
        if inputs != outputs:
            self.short = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.short(x))


class ResNet(nn.Module):
    """ResNet with bottlenecks, `depths` of them in four stages: ResNet-50 is (3, 4, 6, 3) at width 64."""

    def __init__(self, depths: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, *, classes: int = 1000):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                blocks.append(Bottleneck(inputs, width << stage, 2 if stage and i == 0 else 1))
                inputs = 4 * width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images: Tensor, classes: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(images))), 3, 2, 1)
        return F.cross_entropy(self.head(self.blocks(x).mean((2, 3))).float(), classes)


@dataclass(frozen=True)
class Preset:
    """A model with its batch: how it is made, in full or tiny, and what it is trained in."""

    title: str
    make: Callable[[], nn.Module]
    tiny: Callable[[], nn.Module]
    batch: tuple[int, int]
    """Samples, and tokens each or pixels a side."""
    tiny_batch: tuple[int, int]
    images: bool = False
    bf16_weights: bool = False
    """Weights and optimizer state in bfloat16; otherwise float32 under bfloat16 autocast."""

    def build(self, device: str, *, tiny: bool) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
        """The model with weights from a fixed seed, the same in every process, and one batch."""
        torch.manual_seed(0)
        with torch.device(device):
            model = (self.tiny if tiny else self.make)()
            initialize(model)
            count, length = self.tiny_batch if tiny else self.batch
            if self.images:
                inputs = torch.randn(count, 3, length, length).to(memory_format=torch.channels_last)
                targets = torch.randint(0, model.head.out_features, (count,))
            else:
                tokens = torch.randint(0, model.head.out_features, (count, length + 1))
                inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        if self.images:
            model = model.to(memory_format=torch.channels_last)
        return model.to(torch.bfloat16) if self.bf16_weights else model, (inputs, targets)


def initialize(model: nn.Module) -> None:
    """Normal with std 0.02 for what multiplies tokens, He for convolutions: activations of the usual size."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 4:
            nn.init.normal_(parameter, std=math.sqrt(2 / parameter[0].numel()))
        elif parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


PRESETS = {
    "gpt2": Preset(
        "GPT-2 124M, 16 x 1024 tokens, autocast",
        lambda: GPT2(768, 12, 12),
        lambda: GPT2(64, 1, 2, symbols=128, context=32),
        (16, 1024),
        (2, 32),
    ),
    "llama": Preset(
        "Llama 1B, 4 x 2048 tokens, bf16 weights",
        Llama,
        lambda: Llama(64, 1, 4, 2, 128, symbols=128, context=32),
        (4, 2048),
        (2, 32),
        bf16_weights=True,
    ),
    "resnet50": Preset(
        "ResNet-50, 256 images, autocast, channels last",
        ResNet,
        lambda: ResNet((1, 1), 8, classes=10),
        (256, 224),
        (2, 32),
        images=True,
    ),
    "vit": Preset(
        "ViT-B/16, 128 images, autocast",
        lambda: ViT(768, 12, 12),
        lambda: ViT(64, 1, 2, side=32, classes=10),
        (128, 224),
        (2, 32),
        images=True,
    ),
    "gpt2-medium": Preset(
        "GPT-2 350M, 8 x 1024 tokens, autocast",
        lambda: GPT2(1024, 24, 16),
        lambda: GPT2(64, 2, 2, symbols=128, context=32),
        (8, 1024),
        (2, 32),
    ),
}
"""The most telling first: what the time does not suffice for is cut from the end."""
