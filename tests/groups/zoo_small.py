"""Models that others wrote, narrow and two layers deep, with random weights; and what is found in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

import cacompile
from cacompile.explanation.explain import Explanation

transformers = pytest.importorskip("transformers")

BLOCK_ROWS = 32
VOCABULARY, WIDTH, HIDDEN = 300, 64, 96
LAYERS, HEADS, KEY_HEADS, EXPERTS = 2, 4, 2, 4
STAGES = (32, 32, 64, 64)
CLASSES = 10


class Model(NamedTuple):
    """A model, and what it is called with."""

    module: nn.Module
    inputs: dict[str, torch.Tensor]


def _tokens() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(VOCABULARY, (2, 16))}


def _images(pixels: int = 64) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.rand(2, 3, pixels, pixels)}


_LLAMA = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KEY_HEADS, "use_cache": False,
}  # fmt: skip
_BERT = {
    "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def _gpt2() -> Model:
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    sizes = {"vocab_size": VOCABULARY, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(**sizes, **dropout, use_cache=False, bos_token_id=1, eos_token_id=2)
    return Model(transformers.GPT2LMHeadModel(config), _tokens())


def _llama() -> Model:
    return Model(transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA)), _tokens())


def _mixtral(dtype: torch.dtype = torch.float32) -> Model:
    config = transformers.MixtralConfig(**_LLAMA, num_local_experts=EXPERTS)
    return Model(transformers.MixtralForCausalLM(config).to(dtype), _tokens())


def _bert() -> Model:
    return Model(transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=VOCABULARY, **_BERT)), _tokens())


def _vit() -> Model:
    config = transformers.ViTConfig(**_BERT, image_size=32, patch_size=8, num_labels=CLASSES)
    return Model(transformers.ViTForImageClassification(config), _images(32))


def _resnet18() -> Model:
    sizes = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": list(STAGES), "embedding_size": STAGES[0]}
    return Model(
        transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=CLASSES)), _images()
    )


def _convnext() -> Model:
    config = transformers.ConvNextConfig(
        hidden_sizes=[32, 64, 64], depths=[1, 1, 2], num_stages=3, num_labels=CLASSES, layer_scale_init_value=0.5
    )
    return Model(transformers.ConvNextForImageClassification(config), _images(32))


MAKE: dict[str, Callable[[], Model]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mixtral": _mixtral,
    "mixtral_bf16": lambda: _mixtral(torch.bfloat16),
    "bert": _bert,
    "vit": _vit,
    "resnet18": _resnet18,
    "convnext": _convnext,
}


@functools.cache
def made(name: str) -> Model:
    """The same each time; do not change it."""
    torch.manual_seed(0)
    return MAKE[name]()


@functools.cache
def explained(name: str) -> Explanation:
    model = made(name)
    return cacompile.explain(model.module, options={"block_rows": BLOCK_ROWS}, **model.inputs)


def slices_of(group: Any) -> set[tuple[str, int, int, int]]:
    return {(piece.param, piece.dim, piece.start, piece.stop) for piece in group.slices}
