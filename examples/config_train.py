"""Train what a TOML file says: each block compiled by itself, by whatever backend the file names.

So do torchtitan and others: the trainer knows nothing of convaware but its name. Blocks of one shape share a graph, and
each has a mask of its own.
"""

from __future__ import annotations

import argparse
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from data import load_shakespeare, text_batches
from models import GPT
from torch import nn

import cacompile

SMOKE = {
    "model": {"width": 32, "depth": 2, "heads": 2, "context": 16},
    "training": {"steps": 8, "batch": 4},
    "optimizer": {"lr": 1e-5},  # what moves slowly is skipped early
    "compile": {"options": {"warmup_steps": 2, "monitor_every": 1, "tolerance": 1.0, "block_rows": 16}},
}


def apply_compile(blocks: nn.ModuleList, config: dict[str, Any]) -> None:
    """Compile each block in place, so that the names in checkpoints stay as they are."""
    if config["enable"]:
        for block in blocks:
            block.compile(
                backend=config["backend"], fullgraph=config["fullgraph"], options=config.get("options") or None
            )


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Train and print where it stands."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path(__file__).with_suffix(".toml"))
    parser.add_argument("--backend", help="instead of the file's")
    parser.add_argument("--smoke", action="store_true", help="seconds, on a tiny model")
    args = parser.parse_args(argv)
    config = tomllib.loads(args.config.read_text(encoding="utf-8"))
    if args.smoke:
        config = {name: {**section, **SMOKE.get(name, {})} for name, section in config.items()}
    if args.backend:
        config["compile"]["backend"] = args.backend
        if args.backend != "convaware":
            config["compile"].pop("options", None)
    training, optimizing = config["training"], dict(config["optimizer"])
    torch.manual_seed(training["seed"])
    text = load_shakespeare()
    model = GPT(len(text.symbols), **config["model"])
    apply_compile(model.blocks, config["compile"])
    optimizer = getattr(torch.optim, optimizing.pop("name"))(model.parameters(), **optimizing)
    batches = text_batches(text.train, training["batch"], config["model"]["context"], training["seed"])
    for step, (x, y) in zip(range(training["steps"]), batches):
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == training["steps"] - 1:
            print(f"step {step}: loss {loss.item():.4f}")
    if config["compile"]["enable"] and config["compile"]["backend"] == "convaware":
        print(cacompile.status(model))
    return model


if __name__ == "__main__":
    main()
