"""Train a small Llama on Shakespeare's characters with Hugging Face's Trainer and convaware.

All that is new to a Trainer is the callback: it compiles the model, adds `convaware/...` to every log and
`cacompile.pt` to every checkpoint. `--resume` continues from the last checkpoint, bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from data import load_shakespeare
from torch import Tensor
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import cacompile
from cacompile.integrations.transformers import ConvAwareCallback

SMOKE = {"steps": 8, "width": 32, "depth": 1, "context": 16, "batch": 4, "every": 1, "lr": 1e-5}
# with the low rate: what moves slowly is skipped early
EAGER_TO_SKIP = {"warmup_steps": 2, "monitor_every": 1, "tolerance": 1.0, "block_rows": 16}


class Windows(Dataset[dict[str, Tensor]]):
    """Stretches of a text, one after the other, each its own target: the model shifts it."""

    def __init__(self, tokens: Tensor, context: int) -> None:
        self.windows = tokens[: len(tokens) // context * context].view(-1, context)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        window = self.windows[i].long()
        return {"input_ids": window, "labels": window}


def main(argv: Sequence[str] | None = None) -> Trainer:
    """Train, evaluate and print where it stands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--context", type=int, default=64, help="characters the model sees")
    parser.add_argument("--batch", type=int, default=32, help="sequences in a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--every", type=int, default=20, help="steps between two logs")
    parser.add_argument("--out", type=Path, default=Path("demo/hf"), help="for checkpoints")
    parser.add_argument("--resume", action="store_true", help="from the last checkpoint in --out")
    parser.add_argument("--smoke", action="store_true", help="seconds, on a tiny model")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(**SMOKE)
    args = parser.parse_args(argv)
    text = load_shakespeare()
    set_seed(0)
    sizes: dict[str, Any] = {"hidden_size": args.width, "intermediate_size": 3 * args.width}
    config = LlamaConfig(vocab_size=len(text.symbols), num_hidden_layers=args.depth, num_attention_heads=4, **sizes)
    trainer = Trainer(
        LlamaForCausalLM(config),
        TrainingArguments(
            str(args.out),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            logging_steps=args.every,
            save_steps=args.steps // 2,
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
        ),
        train_dataset=Windows(text.train, args.context),
        eval_dataset=Windows(text.valid[: args.context * 512], args.context),
        callbacks=[ConvAwareCallback(EAGER_TO_SKIP if args.smoke else None)],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    print(cacompile.status(trainer.model))
    print(f"validation loss {trainer.evaluate()['eval_loss']:.4f}")
    return trainer


if __name__ == "__main__":
    main()
