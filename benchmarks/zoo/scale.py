"""How long it takes to find the groups of a Llama as large as 8B, whose weights take no memory.

    python -m benchmarks.zoo.scale                    # 8, 16 and 32 layers, to benchmarks/results/zoo_scale.csv
    python -m benchmarks.zoo.scale --layers 2 --out . # a smaller one

Counts nodes of the joint graph and groups; measures the seconds of the analysis alone, the best of a few.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import cacompile
from benchmarks.lib.rows import RESULTS

VOCABULARY, HIDDEN, KEY_HEADS = 128_256, 14_336, 8


@dataclass
class Scale:
    """One row of the table."""

    layers: int
    nodes: int
    analysis_s: float
    heads: int
    neurons: int
    tokens: int
    coverage: float


def llama(layers: int) -> torch.nn.Module:
    """On meta: shapes without values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 4096, "intermediate_size": HIDDEN, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 32, "num_key_value_heads": KEY_HEADS, "max_position_embeddings": 8192}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=False, use_cache=False))


def measure(layers: int, rounds: int = 1) -> Scale:
    model = llama(layers)
    tokens = torch.zeros(1, 128, dtype=torch.int64, device="meta")
    runs = []
    for _ in range(rounds):
        torch._dynamo.reset()
        runs.append(cacompile.explain(model, tokens, options={"block_rows": 128}))
    kinds = Counter(group.kind for group in runs[0].groups)
    fastest = min(run.analysis_s for run in runs)
    return Scale(layers, runs[0].nodes, fastest, kinds["heads"], kinds["neurons"], kinds["tokens"], runs[0].coverage)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", type=int, default=[8, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of zoo_scale.csv")
    args = parser.parse_args(argv)
    rows = []
    for layers in args.layers:
        rows.append(asdict(measure(layers, args.rounds)))
        print(rows[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    with open(args.out / "zoo_scale.csv", "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({**row, "analysis_s": f"{row['analysis_s']:.4g}"} for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
