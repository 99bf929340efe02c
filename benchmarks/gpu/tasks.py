"""The tasks of `benchmarks.gpu.quality`: ResNet-18, a GPT of 38 M parameters, and MiniLM, under bfloat16 autocast.

Steps are for about 20 seconds a run on an H100. That is an estimate, for none has run on a GPU yet: a step of the GPT
has 4.0 TFLOP (counted), at 200 TFLOP/s 20 ms; one of ResNet-18 has 1.4, at 75, as its layers are small and half of its
time goes into batch norms, 19 ms; one of MiniLM has 0.07, and takes what the host needs to launch it, about 10 ms.
Peak learning rates are those that are usual for such models; they were not looked for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu import minilm
from benchmarks.quality.plan import tiny_task
from benchmarks.quality.snippets import shuffled
from benchmarks.quality.task import Batch, Split, Task
from benchmarks.quality.tasks import adamw
from benchmarks.quality.vision import VALID_IMAGES, flipped_and_cropped
from examples.data import Images, find_fashion_mnist, image_batches, load_fashion_mnist, text_batches, to_float
from examples.models import GPT, Residual

# ---- ResNet-18 on Fashion-MNIST


class ResNet18(nn.Module):
    """ResNet-18 for small images: a stem of 3x3, no pooling; grey images (batch, 1, 28, 28) to logits (batch, 10)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(4):
            outputs = width << stage
            blocks += [Residual(inputs, outputs, 2 if stage else 1), Residual(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.norm(self.stem(images)))).mean((2, 3)))


@functools.cache
def _images() -> Images:
    return load_fashion_mnist(find_fashion_mnist(fetch=False))


def _image_batches(seed: int) -> Iterator[Batch]:
    images = _images()
    stream = image_batches(images.train_x[:-VALID_IMAGES], images.train_y[:-VALID_IMAGES], 512, seed)
    return flipped_and_cropped(stream, seed)


def _held_out_images(split: Split) -> Iterator[Batch]:
    images = _images()
    x, y = (images.train_x[-VALID_IMAGES:], images.train_y[-VALID_IMAGES:]) if split == "valid" else (
        images.test_x, images.test_y)  # fmt: skip
    return ((to_float(x[part]), y[part]) for part in torch.arange(len(x)).split(1000))


def _resnet(width: int) -> nn.Module:
    return ResNet18(width).to(memory_format=torch.channels_last)


# ---- a GPT over the bytes of torch's own sources

WINDOW = 256


@functools.cache
def _bytes() -> dict[str, Tensor]:
    """part -> uint8. Cut by files: of every ten one is for testing and one for validation."""
    folder = Path(torch.__file__).parent
    parts: dict[str, list[bytes]] = {"test": [], "valid": [], "train": []}
    for number, file in enumerate(sorted(folder.rglob("*.py"))):
        parts[("test", "valid", *8 * ["train"])[number % 10]].append(file.read_bytes())
    return {part: torch.frombuffer(bytearray(b"\n".join(texts)), dtype=torch.uint8) for part, texts in parts.items()}


def _held_out_text(split: Split) -> Iterator[Batch]:
    stream = text_batches(_bytes()[split], 64, WINDOW, seed=1)
    return (next(stream) for _ in range(16))


# ---- MiniLM on snippets of Rotten Tomatoes


def _held_out_snippets(split: Split) -> Iterator[Batch]:
    return zip(*(part.split(500) for part in minilm.parts()[split]), strict=True)


# ---- all three


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 0.2, momentum=0.9, weight_decay=5e-4, fused=True)


TASKS = {
    task.name: task
    for task in (
        Task(
            name="resnet18", title="ResNet-18 from scratch on Fashion-MNIST, flips and crops, 10 epochs", steps=1070,
            goal="from scratch", build=lambda: _resnet(64), tiny=lambda: _resnet(16), batches=_image_batches,
            optimizer=_sgd, held_out=_held_out_images, autocast=True,
        ),
        Task(
            name="gpt", title="GPT (d 512, 12 layers, 38 M) from scratch on the bytes of torch's sources", steps=1000,
            goal="from scratch", build=lambda: GPT(256, width=512, depth=12, heads=8, context=WINDOW),
            tiny=lambda: GPT(256, width=32, depth=2, heads=2, context=WINDOW),
            batches=lambda seed: text_batches(_bytes()["train"], 64, WINDOW, seed),
            optimizer=adamw(1e-3, decay=0.1, beta2=0.95), held_out=_held_out_text, autocast=True,
        ),
        Task(
            name="minilm", title="MiniLM-L6 fine-tuned on Rotten Tomatoes, batches of 32, 3 epochs", steps=690,
            goal="fine-tuning", build=minilm.classifier, tiny=lambda: minilm.classifier(num_hidden_layers=1),
            batches=lambda seed: shuffled(minilm.parts()["train"], 32, seed),
            optimizer=adamw(1e-4), held_out=_held_out_snippets, autocast=True,
        ),
    )
}  # fmt: skip

NEEDS: dict[str, Callable[[], object]] = {
    "resnet18": functools.partial(find_fashion_mnist, fetch=False),
    "gpt": lambda: None,
    "minilm": minilm.find,
}
"""What says by FileNotFoundError that a task's data are out of reach."""


def task_on(name: str, device: str, *, tiny: bool) -> Task:
    """A task with its models and batches on a device."""
    task = tiny_task(TASKS[name]) if tiny else TASKS[name]

    def there(batches: Iterator[Batch]) -> Iterator[Batch]:
        return (tuple(part.to(device) for part in batch) for batch in batches)

    return replace(
        task,
        build=lambda: task.build().to(device),
        batches=lambda seed: there(task.batches(seed)),
        held_out=lambda split: there(task.held_out(split)),
    )
