"""The zoo: models as their libraries build them, random weights, small sizes, the loss they are trained with.

`ZOO` maps a name to (source, factory); a factory needs its library only when it is called. All train without dropout,
so that gradients can be compared bit for bit, and in fp32 but for one: experts have other operations in bf16.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.zoo import custom

VOCABULARY, CLASSES = 512, 32
BATCH, TOKENS, PIXELS = 2, 64, 64


class Case(NamedTuple):
    """A model, one batch, and the loss of what the model returns for it."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    loss: Callable[[Any], Tensor]


Factory = Callable[[], Case]


class MissingLibrary(Exception):
    """The library that a model comes from is not installed."""


def library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingLibrary(f"{name} is not installed") from error


def _integers(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _images(pixels: int = PIXELS) -> Tensor:
    return _floats(BATCH, 3, pixels, pixels)


# transformers: a model's own loss, from labels

_LLAMA = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
_GQA = {**_LLAMA, "num_key_value_heads": 2, "head_dim": 64}
_BERT = {**_LLAMA, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_VIT = {**_BERT, "image_size": PIXELS, "patch_size": 8, "num_labels": CLASSES}
_HEADS = {"GPT2": "LMHeadModel"}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 256, "intermediate_size": 256}


def _transformers(config: str, model: str, inputs: Callable[[], dict[str, Tensor]], **sizes: Any) -> Factory:
    def make() -> Case:
        transformers = library("transformers")
        torch.manual_seed(0)
        settings = getattr(transformers, f"{config}Config")(**sizes)
        built = getattr(transformers, model)(settings).to(sizes.get("dtype")).train()
        return Case(built, (), inputs(), lambda output: output.loss)

    return make


def _tokens() -> dict[str, Tensor]:
    tokens = _integers(VOCABULARY, BATCH, TOKENS)
    return {"input_ids": tokens, "labels": tokens}


def _labelled_images() -> dict[str, Tensor]:
    return {"pixel_values": _images(), "labels": _integers(CLASSES, BATCH)}


def _speech() -> dict[str, Tensor]:
    return {"input_features": _floats(BATCH, 80, 100), "labels": _integers(VOCABULARY, BATCH, TOKENS // 2)}


def _causal(family: str, **sizes: Any) -> Factory:
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, "use_cache": False, **special, **sizes}
    return _transformers(family, f"{family}{_HEADS.get(family, 'ForCausalLM')}", _tokens, **sizes)


def _masked(family: str, **sizes: Any) -> Factory:
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 128, **sizes}
    return _transformers(family, f"{family}ForMaskedLM", _tokens, **sizes)


def _image(family: str, **sizes: Any) -> Factory:
    return _transformers(family, f"{family}ForImageClassification", _labelled_images, **sizes)


_TRANSFORMERS = {
    "gpt2": _causal("GPT2", n_embd=256, n_layer=2, n_head=4, n_positions=128, attn_pdrop=0.0, embd_pdrop=0.0,
                    resid_pdrop=0.0),
    "gpt_neox": _causal("GPTNeoX", **_LLAMA),
    "llama": _causal("Llama", **_GQA),
    "mistral": _causal("Mistral", **_GQA, sliding_window=32),
    "qwen3": _causal("Qwen3", **_GQA),
    "phi3": _causal("Phi3", **_LLAMA, num_key_value_heads=2),
    "gemma2": _causal("Gemma2", **_GQA, sliding_window=32),
    "falcon": _causal("Falcon", **_LLAMA, attention_dropout=0.0, hidden_dropout=0.0),
    "mixtral": _causal("Mixtral", **_GQA, num_local_experts=4, num_experts_per_tok=2),
    "mixtral_bf16": _causal("Mixtral", **_GQA, num_local_experts=4, num_experts_per_tok=2, dtype=torch.bfloat16),
    "mixtral_batched": _causal("Mixtral", **_GQA, num_local_experts=4, num_experts_per_tok=2,
                               experts_implementation="batched_mm"),
    "mixtral_eager": _causal("Mixtral", **_GQA, num_local_experts=4, num_experts_per_tok=2,
                             experts_implementation="eager"),
    "qwen3_moe": _causal("Qwen3Moe", **{**_GQA, **_EXPERTS}, num_experts=4),
    "olmoe": _causal("Olmoe", **{**_LLAMA, **_EXPERTS}, num_experts=4),
    "mamba": _causal("Mamba", hidden_size=128, state_size=8, num_hidden_layers=2, expand=2),
    "bert": _masked("Bert", **_BERT),
    "roberta": _masked("Roberta", **_BERT),
    "distilbert": _masked("DistilBert", dim=256, hidden_dim=512, n_layers=2, n_heads=4, dropout=0.0,
                          attention_dropout=0.0),
    "t5": _transformers("T5", "T5ForConditionalGeneration", _tokens, vocab_size=VOCABULARY, d_model=256, d_kv=64,
                        d_ff=512, num_layers=2, num_heads=4, dropout_rate=0.0, use_cache=False,
                        decoder_start_token_id=0),
    "whisper": _transformers("Whisper", "WhisperForConditionalGeneration", _speech, vocab_size=VOCABULARY, d_model=256,
                             encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
                             encoder_ffn_dim=512, decoder_ffn_dim=512, max_source_positions=50, dropout=0.0,
                             use_cache=False, max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                             decoder_start_token_id=1, suppress_tokens=None, begin_suppress_tokens=None),
    "vit": _image("ViT", **_VIT),
    "deit": _image("DeiT", **_VIT),
    "swin": _image("Swin", image_size=PIXELS, patch_size=4, embed_dim=64, depths=[2, 2], num_heads=[2, 4],
                   window_size=4, drop_path_rate=0.0, num_labels=CLASSES),
    "convnext": _image("ConvNext", hidden_sizes=[64, 128, 256], depths=[1, 1, 2], num_stages=3, num_labels=CLASSES),
}  # fmt: skip


# timm and what is written here: cross-entropy of the logits


def _classify(model: nn.Module, image: Tensor) -> Case:
    target = _integers(CLASSES, len(image))
    return Case(model.train(), (image,), {}, lambda logits: F.cross_entropy(logits, target))


def _timm(name: str, pixels: int = PIXELS, **sizes: Any) -> Factory:
    def make() -> Case:
        timm = library("timm")
        torch.manual_seed(0)
        return _classify(timm.create_model(name, num_classes=CLASSES, **sizes), _images(pixels))

    return make


_TIMM = {
    "resnet18": _timm("resnet18"),
    "resnet50": _timm("resnet50", layers=(2, 1, 1, 1)),
    "regnety_002": _timm("regnety_002"),
    "efficientnet_b0": _timm("efficientnet_b0"),
    "mobilenetv3": _timm("mobilenetv3_small_100"),
    "nfnet": _timm("nfnet_l0", depths=(1, 1, 1, 1)),
    "convnext_atto": _timm("convnext_atto", depths=(1, 1, 2, 1)),
    "vit_small": _timm("vit_small_patch16_224", img_size=PIXELS, depth=2),
    "mixer_s16": _timm("mixer_s16_224", img_size=PIXELS),
}


def _token_case(make_model: Callable[..., nn.Module], *sizes: Any) -> Factory:
    def make() -> Case:
        torch.manual_seed(0)
        tokens = _integers(VOCABULARY, BATCH, TOKENS + 1)
        inputs, target = tokens[:, :-1].contiguous(), tokens[:, 1:].flatten()
        return Case(make_model(*sizes), (inputs,), {}, lambda logits: F.cross_entropy(logits.flatten(0, 1), target))

    return make


def _mlp(width: int, layers: int) -> Factory:
    def make() -> Case:
        torch.manual_seed(0)
        return _classify(custom.mlp_chain(width, layers, CLASSES), _floats(128, width))

    return make


def _unet() -> Case:
    torch.manual_seed(0)
    target = _integers(CLASSES, BATCH, 32, 32)
    return Case(custom.UNet(64, CLASSES), (_images(32),), {}, lambda logits: F.cross_entropy(logits, target))


_CUSTOM = {
    "einsum_transformer": _token_case(custom.einsum_transformer, 256, 4, 512, 2, VOCABULARY),
    "einsum_moe": _token_case(custom.mixture, custom.EinsumMoE, 128, 4, 256, 4, VOCABULARY),
    "list_moe": _token_case(custom.mixture, custom.ListMoE, 128, 4, 256, 4, VOCABULARY),
    "torch_encoder": _token_case(custom.encoder, 256, 4, 512, 2, VOCABULARY),
    "mlp_chain": _mlp(256, 3),
    "unet": _unet,
}

ZOO: dict[str, tuple[str, Factory]] = {
    **{name: ("transformers", factory) for name, factory in _TRANSFORMERS.items()},
    **{name: ("timm", factory) for name, factory in _TIMM.items()},
    **{name: ("here", factory) for name, factory in _CUSTOM.items()},
}
