"""Train ResNet-8 on Fashion-MNIST in a loop of Accelerate's, with accumulated gradients and checkpoints.

New to such a loop are three lines: an import, the plugin, and the session among what is saved. `--resume` continues
from the checkpoint in `--out`, bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from data import load_fashion_mnist, to_float
from models import ResNet8
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import cacompile
import cacompile.integrations.accelerate  # so that the plugin takes our name

SMOKE = {"steps": 8, "images": 512, "batch": 16, "lr": 1e-4}
# with the low rate: what moves slowly is skipped early
EAGER_TO_SKIP = {"warmup_steps": 2, "monitor_every": 1, "tolerance": 1.0, "block_rows": 16}


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Train, save in the middle, and print where it stands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--accumulate", type=int, default=2, help="batches in a step")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--width", type=float, default=1, help="factor of the widths 16, 32 and 64; below 1, see docs/faq.md on oneDNN"
    )
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--images", type=int, default=20_000, help="of the 60,000 for training, the first ones")
    parser.add_argument("--data", help="folder with the four files of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=Path("demo/accelerate"), help="for the checkpoint")
    parser.add_argument("--resume", action="store_true", help="from the checkpoint in --out")
    parser.add_argument("--smoke", action="store_true", help="seconds, on a tiny model")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args(argv)
    options = EAGER_TO_SKIP if args.smoke else {}
    plugin = TorchDynamoPlugin(backend="convaware", options=options)
    accelerator = Accelerator(dynamo_plugin=plugin, gradient_accumulation_steps=args.accumulate)
    torch.manual_seed(0)
    model = ResNet8(width=args.width)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9)
    found = load_fashion_mnist(args.data)
    images = TensorDataset(to_float(found.train_x[: args.images]), found.train_y[: args.images])
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(images, args.batch, drop_last=True))
    accelerator.register_for_checkpointing(cacompile.session(model))
    step, done = 0, 0
    if args.resume:
        accelerator.load_state(str(args.out))
        done = args.steps // 2
    while step < args.steps:
        for x, y in loader:
            with accelerator.accumulate(model):
                if step >= done:  # else these images have been seen before the checkpoint
                    accelerator.backward(F.cross_entropy(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
                step += accelerator.sync_gradients
            if accelerator.sync_gradients and step == args.steps // 2 > done:
                accelerator.save_state(str(args.out))
            if step == args.steps:
                break
    accelerator.print(cacompile.status(model))
    return accelerator.unwrap_model(model, keep_torch_compile=False)


if __name__ == "__main__":
    main()
