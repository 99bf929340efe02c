"""Train a character GPT on Shakespeare with Lightning and convaware.

`configure_model` compiles the network in place; the callback logs `convaware/...` and puts the session into Lightning's
checkpoints. `--resume CHECKPOINT` continues from one; as ever with Lightning, data begins anew within an epoch unless
the loader keeps a state of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from data import load_shakespeare
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from models import GPT
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import cacompile
from cacompile.integrations.lightning import ConvAwareCallback

SMOKE = {"steps": 8, "width": 32, "depth": 1, "context": 16, "batch": 4, "every": 1, "lr": 1e-5}
# with the low rate: what moves slowly is skipped early
EAGER_TO_SKIP = {"warmup_steps": 2, "monitor_every": 1, "tolerance": 1.0, "block_rows": 16}


class Characters(L.LightningModule):
    """A GPT that predicts the next character."""

    def __init__(self, net: nn.Module, lr: float, options: dict[str, Any]) -> None:
        super().__init__()
        self.net, self.lr, self.options = net, lr, options

    def configure_model(self) -> None:
        self.net.compile(backend="convaware", options=self.options)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        window = batch[0].long()
        loss = nn.functional.cross_entropy(self.net(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), self.lr)


def main(argv: Sequence[str] | None = None) -> L.Trainer:
    """Train and print where it stands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--context", type=int, default=64, help="characters the model sees")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=20, help="steps between two logs")
    parser.add_argument("--out", type=Path, default=Path("demo/lightning"), help="for logs and checkpoints")
    parser.add_argument("--resume", type=Path, help="a checkpoint")
    parser.add_argument("--smoke", action="store_true", help="seconds, on a tiny model")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args(argv)
    text = load_shakespeare()
    length = args.context + 1
    windows = text.train[: len(text.train) // length * length].view(-1, length)
    L.seed_everything(0, verbose=False)
    net = GPT(len(text.symbols), width=args.width, depth=args.depth, context=args.context)
    module = Characters(net, args.lr, EAGER_TO_SKIP if args.smoke else {})
    trainer = L.Trainer(
        max_steps=args.steps,
        gradient_clip_val=1.0,
        logger=CSVLogger(args.out),
        log_every_n_steps=args.every,
        callbacks=[
            ConvAwareCallback(),
            ModelCheckpoint(args.out, "{step}", every_n_train_steps=args.steps // 2, save_top_k=-1),
        ],
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(windows), args.batch), ckpt_path=args.resume)
    print(cacompile.status(module))
    return trainer


if __name__ == "__main__":
    main()
