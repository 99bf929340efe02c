"""Train a character GPT on the complete Shakespeare with Inductor and with convaware, side by side (`make demo`)."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice

import torch
from compare import Run, Task, compare, parse
from data import load_shakespeare, text_batches
from measuring import cross_entropy
from models import GPT
from torch import Tensor, nn

SMOKE = {"steps": 12, "width": 32, "depth": 1, "heads": 2, "context": 16, "batch": 4, "chunk": 2, "valid": 2}


def main(argv: Sequence[str] | None = None) -> list[Run]:
    """Train, print the comparison, write picture and CSV; the runs come back in the order of the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=64, help="characters the model sees")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate of AdamW")
    parser.add_argument("--tied", action="store_true", help="share the embedding with the head")
    parser.add_argument("--valid", type=int, default=40, help="validation batches, twice as large")
    args = parse(parser, SMOKE, argv)
    text = load_shakespeare()

    def evaluate(model: nn.Module) -> Tensor:
        batches = islice(text_batches(text.valid, 2 * args.batch, args.context, seed=1), args.valid)
        return torch.stack([cross_entropy(model(x.to(args.device)), y.to(args.device)).cpu() for x, y in batches])

    def build() -> nn.Module:
        size = {"width": args.width, "depth": args.depth, "heads": args.heads, "context": args.context}
        return GPT(len(text.symbols), **size, tied=args.tied)

    task = Task(
        title=f"GPT of {sum(p.numel() for p in build().parameters()) / 1e6:.1f} M on Shakespeare's characters",
        build=build,
        batches=lambda: text_batches(text.train, args.batch, args.context, args.seed),
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), fused=True),
        evaluate=evaluate,
        score="validation loss, nats",
    )
    return compare(task, args)


if __name__ == "__main__":
    main()
