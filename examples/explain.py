"""What one can see of a model's graphs, before it is trained. The outputs in docs/explain.md are this script's.

python examples/explain.py --out shown    # a small model: the files that docs/explain.md is about
python examples/explain.py --layers 80    # a Llama of 70B sizes, on meta: about 2 minutes of one core
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import cacompile


class Block(nn.Module):
    """A residual MLP."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """A classifier of small images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 3)
        self.block = Block(64)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.block(self.conv(images).mean((2, 3))))


def small(out: Path) -> None:
    """Write all that there is to see of a small model."""
    found = cacompile.explain(Model(), torch.zeros(16, 3, 8, 8), options={"block_rows": 64})
    print(found)
    out.mkdir(parents=True, exist_ok=True)
    for version in ("joint", "forward", "backward", "masked"):
        found.code(version, path=out / f"{version}.py")
    found.diff(path=out / "backward.diff")
    found.show("block.up.weight", path=out / "explain.svg")
    found.show("block.up.weight", "dot", path=out / "explain.dot")
    found.to_json(out / "explain.json")
    found.to_html(out / "groups.html")


def large(layers: int) -> None:
    """Measure how long it takes to look at a model of a size that no laptop could hold."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64, "num_key_value_heads": 8}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=128_256, num_hidden_layers=layers, use_cache=False))
        tokens = torch.zeros(1, 512, dtype=torch.int64)
    start = time.process_time()
    found = cacompile.explain(model, tokens, labels=tokens)
    seconds = time.process_time() - start
    start = time.process_time()
    lines = found.code("masked").count("\n")
    billions = sum(param.numel() for param in model.parameters()) / 1e9
    print(f"{billions:.1f}B parameters in {layers} layers: {found.nodes} nodes, {seconds:.0f} s of CPU")
    print(f"{found.coverage:.1%} of dW FLOPs can be skipped")
    print(f"masked backward: {lines} lines, {time.process_time() - start:.1f} s of CPU")
    print(f"most memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, help="look at a Llama of 70B sizes with so many layers instead")
    parser.add_argument("--out", type=Path, default=Path("shown"), help="folder to write to")
    args = parser.parse_args(argv)
    if args.layers is not None:
        large(args.layers)
    else:
        small(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
