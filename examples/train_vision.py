"""Train ResNet-8 on a part of Fashion-MNIST with Inductor and with convaware, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from compare import Run, Task, compare, parse
from data import image_batches, load_fashion_mnist, to_float
from models import ResNet8
from torch import Tensor, nn

SMOKE = {"steps": 12, "images": 512, "test": 256, "batch": 16, "chunk": 2, "lr": 1e-4}


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train, print the comparison, write picture and CSV; the runs come back in the order of the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument(
        "--width", type=float, default=1, help="factor of the widths 16, 32 and 64; below 1, see docs/faq.md on oneDNN"
    )
    parser.add_argument("--images", type=int, default=20_000, help="of the 60,000 for training, the first ones")
    parser.add_argument("--test", type=int, default=10_000, help="of the 10,000 for testing, the first ones")
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    parser.add_argument("--lr", type=float, default=0.1, help="peak learning rate of SGD")
    parser.add_argument("--data", help="folder with the four files of Fashion-MNIST")
    args = parse(parser, SMOKE, argv)
    images = load_fashion_mnist(args.data)
    train_x, train_y = images.train_x[: args.images], images.train_y[: args.images]

    def evaluate(model: nn.Module) -> Tensor:
        right = []
        for part in torch.arange(args.test).split(250):
            guess = model(to_float(images.test_x[part]).to(args.device)).argmax(1).cpu()
            right.append((guess == images.test_y[part]).float().mean())
        return torch.stack(right)

    task = Task(
        title=f"ResNet-8 on {args.images:,} of the 60,000 images of Fashion-MNIST",
        build=lambda: ResNet8(width=args.width),
        batches=lambda: image_batches(train_x, train_y, args.batch, args.seed),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=5e-4),
        evaluate=evaluate,
        score=f"accuracy on {args.test:,} test images",
        higher_is_better=True,
    )
    return compare(task, args)


if __name__ == "__main__":
    main()
