"""A Llama-style GPT on the complete Shakespeare."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.quality.task import Batch, Split
from examples.data import CACHE, load_shakespeare, text_batches

WINDOW, BATCH, VOCABULARY = 64, 32, 4096


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


def batches(seed: int, batch: int = BATCH) -> Iterator[Batch]:
    """Endless random windows of the training part."""
    return text_batches(_tokens()["train"], batch, WINDOW, seed)


def held_out(split: Split) -> Iterator[Batch]:
    stream = text_batches(_tokens()[split], 32, WINDOW, seed=1)
    return (next(stream) for _ in range(30))
