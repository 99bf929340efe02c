"""Small networks on Fashion-MNIST: all ten classes, or five after a network has learned the other five."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.task import Batch, Split, decaying
from examples.data import CACHE, image_batches, load_fashion_mnist, to_float
from examples.models import ResNet8

IMAGES, VALID_IMAGES, BATCH = 20_000, 5_000, 512
SHIFT = 2
"""Pixels by which a cropped image is off its middle at most."""


class ViT(nn.Module):
    """Vision transformer with mean pooling: grey images (batch, 1, 28, 28) to logits (batch, classes)."""

    def __init__(self, *, width: int = 64, depth: int = 4, heads: int = 4, patch: int = 7, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, patch)
        self.position = nn.Parameter(torch.randn((28 // patch) ** 2, width) * 0.02)
        layer = functools.partial(nn.TransformerEncoderLayer, width, heads, 4 * width, 0.0, "gelu", norm_first=True)
        self.blocks = nn.ModuleList(layer(batch_first=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


_images = functools.cache(load_fashion_mnist)


def batches(seed: int, batch: int = BATCH) -> Iterator[Batch]:
    """Endless epochs of IMAGES images, each shuffled anew."""
    images = _images()
    return image_batches(images.train_x[:IMAGES], images.train_y[:IMAGES], batch, seed)


def augmented(seed: int, batch: int = BATCH) -> Iterator[Batch]:
    """As `batches`, flipped and cropped."""
    return flipped_and_cropped(batches(seed, batch), seed)


def flipped_and_cropped(stream: Iterator[Batch], seed: int) -> Iterator[Batch]:
    """Each image of 28 x 28 mirrored or not, and cropped after SHIFT pixels were added on all sides."""
    random = torch.Generator().manual_seed(seed)
    places = torch.arange(28)
    for images, labels in stream:
        padded = F.pad(images, (SHIFT,) * 4, value=float(images.min()))
        down, right = torch.randint(0, 2 * SHIFT + 1, (2, len(images), 1, 1), generator=random)
        rows, columns = places[:, None] + down, places + right
        columns = torch.where(torch.rand(len(images), 1, 1, generator=random) < 0.5, columns, columns.flip(-1))
        yield padded[torch.arange(len(images))[:, None, None], 0, rows, columns][:, None], labels


def held_out(split: Split) -> Iterator[Batch]:
    images = _images()
    x, y = (images.train_x[-VALID_IMAGES:], images.train_y[-VALID_IMAGES:]) if split == "valid" else (
        images.test_x, images.test_y)  # fmt: skip
    return ((to_float(x[part]), y[part]) for part in torch.arange(len(x)).split(500))


# ---- five classes after the other five

PRETRAINING_STEPS, PRETRAINING_BATCH = 600, 128


def new_batches(seed: int, batch: int = 64) -> Iterator[Batch]:
    """Endless epochs of the images of the upper five classes, whose labels are 0 to 4."""
    images = _images()
    upper = images.train_y[:IMAGES] >= 5
    return image_batches(images.train_x[:IMAGES][upper], images.train_y[:IMAGES][upper] - 5, batch, seed)


def new_held_out(split: Split) -> Iterator[Batch]:
    for images, labels in held_out(split):
        yield images[labels >= 5], labels[labels >= 5] - 5


def pretrained() -> ResNet8:
    """A ResNet-8 that has learned the lower five classes, with a new head; what it learned is kept in CACHE."""
    model, kept = ResNet8(classes=5), CACHE / "resnet8-lower.pt"
    if not kept.exists():
        with torch.random.fork_rng():
            learned = _learn()
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        torch.save(learned, unfinished)
        unfinished.rename(kept)
    state = {name: value for name, value in torch.load(kept).items() if not name.startswith("head.")}
    model.load_state_dict(state, strict=False)
    return model


def _learn() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, images = ResNet8(classes=5), _images()
    lower = images.train_y[:IMAGES] < 5
    stream = image_batches(images.train_x[:IMAGES][lower], images.train_y[:IMAGES][lower], PRETRAINING_BATCH, 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(PRETRAINING_STEPS):
        optimizer.param_groups[0]["lr"] = 0.1 * decaying(step, PRETRAINING_STEPS)
        x, y = next(stream)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()
