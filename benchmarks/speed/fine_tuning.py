"""What a step takes in each way of fine-tuning: all of it, the lower half frozen, the encoder frozen, LoRA by PEFT.

    python -m benchmarks.speed.fine_tuning                      # a classifier with the sizes of MiniLM-L6; minutes
    python -m benchmarks.speed.fine_tuning --smoke --out /tmp/x # seconds; checks that the benchmark itself works

Each way is held against Inductor training all weights. Four models are compiled: all weights and LoRA, by Inductor and
by convaware; convaware's two serve all their ways, by `session.freeze` and `session.pin`, and nothing is recompiled.
Half of dW is skipped by a pinned mask, so that what is timed is the same in every round. Counted: FLOPs of forward and
backward passes, less those skipped, and the share of them that dW is; bytes alive between forward and backward
(`benchmarks.lib.memory`).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from tabulate import tabulate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

import cacompile
from benchmarks.lib.memory import memory_of
from benchmarks.lib.rows import RESULTS, Row, result_file, write_rows
from benchmarks.lib.timing import Spread, interleave, ratios, wall_clock

MIB = 2.0**20
BASE = "all weights, Inductor"


class Way(NamedTuple):
    """A way of fine-tuning: which of the models, what is frozen of it while it is timed, and how much of dW is kept."""

    name: str
    lora: bool
    frozen: Sequence[str] = ()
    keep: float = 1.0
    backend: str = "convaware"


def ways(layers: int) -> list[Way]:
    lower = f"*encoder.layer.[0-{layers // 2 - 1}].*"
    return [
        Way(BASE, lora=False, backend="inductor"),
        Way("all weights, half of dW skipped", lora=False, keep=0.5),
        Way("embeddings and lower half frozen", lora=False, frozen=("bert.embeddings", lower)),
        Way("embeddings and encoder frozen", lora=False, frozen=("bert.embeddings", "bert.encoder")),
        Way("LoRA, Inductor", lora=True, backend="inductor"),
        Way("LoRA, half of dW skipped", lora=True, keep=0.5),
        Way("LoRA, adapters of the lower half frozen", lora=True, frozen=(lower,)),
    ]


class Trained:
    """One compiled model, its optimizer, and which way it is in now."""

    def __init__(self, model: nn.Module, backend: str, batch: dict[str, torch.Tensor]) -> None:
        self.model, self.batch, self.way = model, batch, ""
        options = {"tolerance": 0.0} if backend == "convaware" else None
        self.run = torch.compile(model, backend=backend, options=options)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
        self.session = cacompile.session(model) if backend == "convaware" else None

    def turn(self, way: Way) -> None:
        if self.session is not None and self.way != way.name:
            self.session.thaw()
            if way.frozen:
                self.session.freeze(*way.frozen)
            self.session.pin(keep=way.keep)
            self.way = way.name

    def step(self, way: Way) -> None:
        self.turn(way)
        self.run(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def timed(self, way: Way, seconds: list[float]) -> None:
        """Adds what the step takes, without what turning to another way takes."""
        self.turn(way)
        seconds.append(wall_clock(lambda: self.step(way)))

    def saved_memory(self, way: Way) -> float:
        """MiB that the forward pass saves for the backward."""
        self.turn(way)
        found = memory_of(lambda: self.run(**self.batch).loss, lambda loss: loss.backward())
        self.optimizer.zero_grad()
        return found.saved / MIB


def step_flops(model: nn.Module, batch: dict[str, torch.Tensor], frozen: Sequence[str]) -> float:
    """Of forward and backward passes, with what a way freezes set to require no gradient, run eagerly and counted."""
    model = copy.deepcopy(model)
    if frozen:
        session = cacompile.session(model)
        for name in session.freeze(*frozen):
            model.get_parameter(name).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    return float(counter.get_total_flops())


def make_model(args: argparse.Namespace, lora: bool) -> nn.Module:
    sizes = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "num_attention_heads": args.hidden // 32}
    # of its own accord transformers sets the problem's type in the first forward, and Dynamo compiles again for that
    other = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "problem_type": "single_label_classification",
    }
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=args.layers, **sizes, **other))
    if not lora:
        return model
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, target_modules=["query", "value"]))


def measure(args: argparse.Namespace) -> list[Row]:
    """All ways in turns; prints what was found."""
    batch = {"input_ids": torch.randint(0, 30000, (args.batch, args.length)), "labels": torch.arange(args.batch) % 2}
    case = f"MiniLM of width {args.hidden}, {args.layers} layers, {args.batch * args.length} tokens"
    trained: dict[tuple[bool, str], Trained] = {}
    arms: dict[str, Callable[[], None]] = {}
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    all_ways = ways(args.layers)
    for way in all_ways:
        key = way.lora, way.backend
        if key not in trained:
            trained[key] = Trained(make_model(args, way.lora), way.backend, batch)
            trained[key].step(way._replace(name="first", frozen=(), keep=1.0))
        for _ in range(2):
            trained[key].step(way)
        memory[way.name] = trained[key].saved_memory(way)
        arms[way.name] = partial(trained[key].timed, way, seconds.setdefault(way.name, []))
    counts = {way.name: step_flops(make_model(args, way.lora), batch, way.frozen) for way in all_ways}
    skipped = {}
    for way in all_ways:
        session = trained[way.lora, way.backend].session
        if session is not None and not way.frozen:
            before = session.flops
            trained[way.lora, way.backend].step(way)
            after = session.flops
            skipped[way.name] = (after[0] - before[0], after[1] - before[1])
    interleave(arms, args.rounds)
    rows, table = [], []
    for way in all_ways:
        ratio = ratios(seconds[way.name], seconds[BASE])
        dw, saved = skipped.get(way.name, (0.0, 0.0))
        flops = (counts[way.name] - saved) / counts[BASE]
        rows += [
            (case, way.name, "step", "s", Spread.of(seconds[way.name])),
            (case, way.name, "step", f"ratio to {BASE}", ratio),
            (case, way.name, "FLOPs of a step", f"ratio to {BASE}", Spread.of([flops])),
            (case, way.name, "saved by the forward", "MiB", Spread.of([memory[way.name]])),
        ]
        if dw:
            rows.append((case, way.name, "dW", "share of a step's FLOPs", Spread.of([dw / counts[way.name]])))
        share = f"{dw / counts[way.name]:.1%}" if dw else ""
        table.append((way.name, str(ratio), f"{flops:.3f}", share, f"{memory[way.name]:.2f}"))
    print(case)
    heads = ["way", f"step / {BASE}", "FLOPs", "dW of a step", "saved activations, MiB"]
    print(tabulate(table, headers=heads, disable_numparse=True))
    return rows


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=64, help="tokens of a sentence")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=result_file, default=RESULTS / "fine_tuning_cpu.csv")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, three rounds")
    args = parser.parse_args(argv)
    if args.smoke:
        args.hidden, args.layers, args.length, args.batch, args.rounds = 64, 2, 16, 2, 3
    rows = measure(args)
    write_rows(args.out, "fine_tuning", rows)
    print(f"median [quartiles] of {args.rounds} interleaved rounds, {torch.get_num_threads()} threads")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
