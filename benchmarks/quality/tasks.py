"""The tasks of `benchmarks.quality`: real models on public data, small enough for minutes on two cores.

Long ones end where their users would stop, early ones long before anything has converged.

Four tasks have the peak learning rate at which their full dense run was best on validation data, seed 100, of those
tried: transfer (1, 2, 3, 4 e-3), vit-long (2, 3, 4 e-3), resnet-long (0.1, 0.15), minilm (5, 7.5, 10 e-5); minilm-half
that of a dense run of 80 % of the steps (5, 7.5, 10, 15, 20 e-5). The others' were not looked for. Options are chosen
by `split="valid"`, which is cut from the training data; what is reported is `split="test"`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

from benchmarks.quality import language, snippets, vision
from benchmarks.quality.task import Task, constant
from examples.models import ResNet8


def adamw(lr: float, decay: float = 0.01, beta2: float = 0.999) -> Callable[[nn.Module], torch.optim.Optimizer]:
    def make(model: nn.Module) -> torch.optim.Optimizer:
        trained = [param for param in model.parameters() if param.requires_grad]
        return torch.optim.AdamW(trained, lr, betas=(0.9, beta2), weight_decay=decay, fused=True)

    return make


def _sgd(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)


_gpt = functools.partial(
    Task, build=language.SmallLlama, tiny=lambda: language.SmallLlama(width=32, depth=1, heads=2),
    optimizer=adamw(2e-3, beta2=0.99), held_out=language.held_out,
)  # fmt: skip
_resnet = functools.partial(Task, build=ResNet8, tiny=ResNet8, optimizer=_sgd(0.1), held_out=vision.held_out)
_vit = functools.partial(
    Task, build=vision.ViT, tiny=lambda: vision.ViT(width=32, depth=1, heads=2), held_out=vision.held_out
)
_minilm = functools.partial(Task, batches=snippets.batches, held_out=snippets.held_out)

TASKS = {
    task.name: task
    for task in (
        _minilm(
            name="minilm-long", title="MiniLM-L6 fine-tuned on Rotten Tomatoes, one epoch", steps=478,
            goal="fine-tuning", build=snippets.Classifier, tiny=lambda: snippets.Classifier(num_hidden_layers=1),
            optimizer=adamw(5e-5),
        ),
        _minilm(
            name="minilm-half", title="MiniLM-L6 fine-tuned on Rotten Tomatoes, lower half frozen", steps=478,
            goal="fine-tuning", build=snippets.half_frozen, tiny=lambda: snippets.half_frozen(num_hidden_layers=2),
            optimizer=adamw(2e-4),
        ),
        _minilm(
            name="minilm-lora", title="MiniLM-L6 fine-tuned on Rotten Tomatoes by LoRA of rank 8", steps=478,
            goal="fine-tuning", build=snippets.with_adapters, tiny=lambda: snippets.with_adapters(num_hidden_layers=1),
            optimizer=adamw(1e-3),
        ),
        Task(
            name="transfer", title="ResNet-8 fine-tuned on five classes of Fashion-MNIST after the other five",
            steps=300, goal="fine-tuning", build=vision.pretrained, tiny=lambda: ResNet8(5),
            batches=vision.new_batches, optimizer=adamw(4e-3), held_out=vision.new_held_out,
        ),
        _vit(
            name="vit-long", title="ViT (d 64, 4 layers) from scratch on Fashion-MNIST, 12 epochs of 20,000 images",
            steps=480, goal="from scratch", batches=vision.batches, optimizer=adamw(3e-3),
        ),
        _resnet(
            name="resnet-long", title="ResNet-8 from scratch on Fashion-MNIST, flips and crops, 8 epochs of 20,000",
            steps=312, goal="from scratch", batches=vision.augmented, optimizer=_sgd(0.15),
        ),
        _gpt(
            name="gpt-long", title="GPT (Llama-style, d 128, 3 layers) from scratch on Shakespeare, batches of 16",
            steps=1000, goal="from scratch", batches=functools.partial(language.batches, batch=16),
        ),
        _vit(
            name="vit-over", title="ViT (d 64, 4 layers) from scratch at a constant rate, in batches of 128",
            steps=1200, goal="from scratch", batches=functools.partial(vision.batches, batch=128),
            optimizer=adamw(1e-3), rate=constant,
        ),
        _gpt(
            name="gpt", title="GPT (Llama-style, d 128, 3 layers, 4096 tokens) from scratch on Shakespeare", steps=140,
            goal="early", batches=language.batches,
        ),
        _resnet(
            name="resnet", title="ResNet-8 from scratch on 20,000 images of Fashion-MNIST", steps=100,
            goal="early", batches=vision.batches,
        ),
        _vit(
            name="vit", title="ViT (d 64, 4 layers) from scratch on 20,000 images of Fashion-MNIST", steps=120,
            goal="early", batches=vision.batches, optimizer=adamw(2e-3),
        ),
        _vit(
            name="vit64", title="ViT (d 64, 4 layers) from scratch, in batches of 64", steps=600,
            goal="early", batches=functools.partial(vision.batches, batch=64), optimizer=adamw(1e-3),
        ),
        _minilm(
            name="minilm", title="MiniLM-L6 fine-tuned on snippets of Rotten Tomatoes", steps=80, goal="early",
            build=snippets.Classifier, tiny=lambda: snippets.Classifier(num_hidden_layers=1), optimizer=adamw(1e-4),
        ),
    )
}  # fmt: skip
