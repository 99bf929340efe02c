"""MiniLM and its snippets as one file that travels with the checkout, to machines that have neither of the packages."""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks.quality import snippets
from examples.data import CACHE

KEPT = CACHE / "minilm.pt"
"""Weights in half precision, with embeddings of the words that occur; the snippets as numbers of these."""

CONFIGURATION = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "max_position_embeddings", "type_vocab_size", "layer_norm_eps", "pad_token_id", "hidden_dropout_prob",
    "attention_probs_dropout_prob",
)  # fmt: skip


def find() -> None:
    """FileNotFoundError if neither the file nor what it is made of is here."""
    if find_spec("transformers") is None:
        raise FileNotFoundError("transformers is not installed")
    if not KEPT.exists():
        try:
            snippets.find_packages()
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no {KEPT.relative_to(CACHE.parent)}, and {error}") from None


def classifier(**changed: Any) -> snippets.Classifier:
    """MiniLM with a new head; what it has learned is rounded to half precision."""
    from transformers import BertConfig, BertModel

    kept = _kept()
    config = BertConfig(**{**kept["configuration"], **changed})
    encoder = BertModel(config, add_pooling_layer=False)
    encoder.load_state_dict({name: kept["weights"][name].float() for name in encoder.state_dict()})
    return snippets.Classifier(encoder)


def parts() -> dict[str, snippets.Batch]:
    """part -> (ids, attended, label)."""
    return {name: tuple(part.long() for part in each) for name, each in _kept()["snippets"].items()}


@functools.cache
def _kept() -> dict[str, Any]:
    if not KEPT.exists():
        keep()
    return torch.load(KEPT)


def keep() -> None:
    """Write the file from the two packages."""
    encoder, texts = snippets.Classifier().encoder, snippets.snippets()
    used = torch.unique(torch.cat([ids.flatten() for ids, *_ in texts.values()]))
    weights = {name: value.half() for name, value in encoder.state_dict().items()}
    embeddings = "embeddings.word_embeddings.weight"
    weights[embeddings] = weights[embeddings][used]
    settings = {name: getattr(encoder.config, name) for name in CONFIGURATION}
    if used[0] != settings["pad_token_id"]:
        raise ValueError(f"expected padding to be the first word that occurs, got {int(used[0])}")
    small = {
        name: (torch.searchsorted(used, ids).short(), attended.bool(), label.bool())
        for name, (ids, attended, label) in texts.items()
    }
    settings |= {"vocab_size": len(used), "pad_token_id": 0}
    KEPT.parent.mkdir(parents=True, exist_ok=True)
    unfinished = KEPT.with_suffix(f".{os.getpid()}")
    torch.save({"configuration": settings, "weights": weights, "snippets": small}, unfinished)
    unfinished.rename(KEPT)
