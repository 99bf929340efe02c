"""Time and memory of a step with the lower layers frozen, against Inductor with requires_grad=False from the start.

    python -m benchmarks.speed.truncated                      # a GPT and a MiniLM, all trained and with adapters
    python -m benchmarks.speed.truncated --smoke --out /tmp/x # seconds; checks that the benchmark itself works

Cuts: embeddings and a quarter, half and three quarters of the layers. Arms: `dense` (Inductor, nothing frozen);
`oracle` (Inductor; what is frozen has requires_grad=False before compiling, a model for each cut); `frozen` (convaware:
one model for all cuts, compiled and run with nothing frozen, then `session.freeze`; the controller skips nothing).
Goal: within 3 % of the oracle's time. Counted: bytes alive between forward and backward, and the most alive at a time
(`benchmarks.lib.memory`); what is compiled. Timed once: the first step after a cut's first freeze, which compiles, and
after it was thawed and frozen again.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn

import cacompile
from benchmarks.lib.memory import Memory, memory_of
from benchmarks.lib.rows import RESULTS, Row, result_file, write_rows
from benchmarks.lib.timing import Spread, interleave, ratios, wall_clock
from examples.models import GPT

SYMBOLS = 84
GOAL = 1.03
RANK = 8
CUTS = (0.25, 0.5, 0.75)
MEASURES = ("forward", "forward and backward", "whole step")
MIB = 2.0**20


class Adapted(nn.Module):
    """A linear layer that is frozen for good, with a low-rank adapter beside it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Case(NamedTuple):
    """A model, its layers from the bottom up, what lies below them all, a batch and a loss."""

    name: str
    model: nn.Module
    layers: Sequence[str]
    below: Sequence[str]
    loss: Callable[[nn.Module], Tensor]

    def frozen(self, share: float) -> list[str]:
        """Patterns of what is frozen at a cut."""
        return [*self.below, *self.layers[: math.ceil(share * len(self.layers))]]


class Times(NamedTuple):
    """Seconds of one round."""

    forward: float
    both: float
    step: float


class Arm:
    """One copy of a model with its optimizer."""

    def __init__(self, case: Case, backend: str, *, frozen: Sequence[str] = ()) -> None:
        self.module, self.case = copy.deepcopy(case.model), case
        for name, param in self.module.named_parameters():
            if name in frozen:
                param.requires_grad_(False)
        options = {"tolerance": 0.0} if backend == "convaware" else None
        self.model = torch.compile(self.module, backend=backend, options=options)
        self.optimizer = torch.optim.AdamW([p for p in self.module.parameters() if p.requires_grad], lr=1e-4)
        self.times: list[Times] = []

    def round(self) -> None:
        begin = time.perf_counter()
        loss = self.case.loss(self.model)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.times.append(Times(forward - begin, backward - begin, time.perf_counter() - begin))

    def memory(self) -> Memory:
        found = memory_of(lambda: self.case.loss(self.model), lambda loss: loss.backward())
        self.optimizer.zero_grad()
        return found


def adapt(model: nn.Module) -> None:
    """Put an adapter beside every linear layer, and train nothing else."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    model.requires_grad_(False)
    for name in linear:
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, Adapted(model.get_submodule(name)))


def gpt(args: argparse.Namespace, adapters: bool) -> Case:
    model = GPT(SYMBOLS, width=args.width, depth=args.depth, heads=max(1, args.width // 64), context=args.context)
    tokens = torch.randint(0, SYMBOLS, (args.batch, args.context + 1))
    if adapters:
        adapt(model)

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    layers = [f"blocks.{i}" for i in range(args.depth)]
    below = [] if adapters else ["token", "position"]
    name = f"GPT of width {args.width}, {args.depth} blocks, {args.batch * args.context} tokens"
    return Case(f"{name}{', adapters' * adapters}", model, layers, below, loss)


def minilm(args: argparse.Namespace, adapters: bool) -> Case:
    """A classifier with the sizes of MiniLM-L6 (Wang et al. 2020) and random weights, without dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {"hidden_size": args.hidden, "intermediate_size": 4 * args.hidden, "num_attention_heads": args.hidden // 32}
    # of its own accord transformers sets the problem's type in the first forward, and Dynamo compiles again for that
    other = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "problem_type": "single_label_classification",
    }
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=args.layers, **sizes, **other))
    batch = {"input_ids": torch.randint(0, 30000, (args.batch, args.length)), "labels": torch.arange(args.batch) % 2}
    if adapters:
        adapt(model)
    layers = [f"bert.encoder.layer.{i}" for i in range(args.layers)]
    below = [] if adapters else ["bert.embeddings"]
    name = f"MiniLM of width {args.hidden}, {args.layers} layers, {args.batch * args.length} tokens"
    return Case(f"{name}{', adapters' * adapters}", model, layers, below, lambda model: model(**batch).loss)


MODELS = {"gpt": gpt, "minilm": minilm}


def compiled() -> int:
    """Forwards and backwards that convaware has compiled so far beyond the first of each graph."""
    counts = torch._dynamo.utils.counters["cacompile"]
    return sum(counts[f"versions compiled: {name}"] for name in ("masked", "truncated", "lean forward"))


class Cuts:
    """One convaware model, and what is frozen of it now."""

    def __init__(self, case: Case) -> None:
        self.arm = Arm(case, "convaware")
        self.arm.round()
        self.session = cacompile.session(self.arm.module)
        self.now: float | None = None
        self.times: dict[float, list[Times]] = {cut: [] for cut in CUTS}

    def move(self, cut: float) -> list[str]:
        self.session.thaw()
        self.now = cut
        return self.session.freeze(*self.arm.case.frozen(cut))

    def round(self, cut: float) -> None:
        if self.now != cut:
            self.move(cut)
        self.arm.round()
        self.times[cut].append(self.arm.times[-1])


def measure(case: Case, rounds: int) -> list[Row]:
    """All arms of one case; prints what was found."""
    dense, ours = Arm(case, "inductor"), Cuts(case)
    oracles: dict[float, Arm] = {}
    rows: list[Row] = []
    before = compiled()
    switches: dict[float, tuple[float, float]] = {}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for cut in CUTS:
            names = ours.move(cut)
            cold = wall_clock(ours.arm.round)
            ours.session.thaw()
            ours.arm.round()
            ours.move(cut)
            switches[cut] = cold, wall_clock(ours.arm.round)
            rows += [(case.name, f"frozen {cut}", f"first step, {how}", "s", Spread.of([seconds]))
                     for how, seconds in zip(("cold", "warm"), switches[cut])]  # fmt: skip
            oracles[cut] = Arm(case, "inductor", frozen=names)
    made = compiled() - before
    rows.append((case.name, "frozen", "versions compiled for all cuts", "count", Spread.of([float(made)])))
    memory: dict[str, Memory] = {}
    for _ in range(2):
        dense.round()
        for cut in CUTS:
            ours.round(cut)
            oracles[cut].round()
            memory |= {f"frozen {cut}": ours.arm.memory(), f"oracle {cut}": oracles[cut].memory()}
        memory["dense"] = dense.memory()
    dense.times.clear()
    arms: dict[str, Callable[[], None]] = {"dense": dense.round}
    for cut in CUTS:
        ours.times[cut].clear()
        oracles[cut].times.clear()
        arms |= {f"frozen {cut}": lambda cut=cut: ours.round(cut), f"oracle {cut}": oracles[cut].round}
    interleave(arms, rounds)
    table = []
    for index, what in enumerate(MEASURES):
        seconds = {"dense": [times[index] for times in dense.times]}
        for cut in CUTS:
            seconds[f"frozen {cut}"] = [times[index] for times in ours.times[cut]]
            seconds[f"oracle {cut}"] = [times[index] for times in oracles[cut].times]
        rows += [(case.name, each, what, "s", Spread.of(values)) for each, values in seconds.items()]
        for cut in CUTS:
            found = {base: ratios(seconds[f"frozen {cut}"], seconds[base]) for base in (f"oracle {cut}", "dense")}
            rows += [(case.name, f"frozen {cut}", what, f"ratio to {base}", each) for base, each in found.items()]
            most = ratios(seconds[f"oracle {cut}"], seconds["dense"])
            rows.append((case.name, f"oracle {cut}", what, "ratio to dense", most))
            verdict = "" if what == "forward" else "meets" if found[f"oracle {cut}"].median <= GOAL else "misses"
            table.append((what, cut, *map(str, found.values()), str(most), verdict))
    for index, what in enumerate(("saved by the forward", "peak of forward and backward")):
        amount = {each: found[index] / MIB for each, found in memory.items()}
        rows += [(case.name, each, what, "MiB", Spread.of([value])) for each, value in amount.items()]
        for cut in CUTS:
            mine, theirs, all_of_it = (amount[each] for each in (f"frozen {cut}", f"oracle {cut}", "dense"))
            table.append((f"{what}, MiB", cut, *(f"{a:.2f} / {b:.2f}" for a, b in (
                (mine, theirs), (mine, all_of_it), (theirs, all_of_it))), ""))  # fmt: skip
    print(case.name)
    heads = ["measured", "cut", "frozen / oracle", "frozen / dense", "oracle / dense", f"goal {GOAL}"]
    print(tabulate(table, headers=heads, disable_numparse=True))
    for cut, (cold, warm) in switches.items():
        print(f"cut {cut}: first step {cold:.2f} s, frozen again {warm:.3f} s")
    print(f"{made} forwards and backwards compiled for {len(CUTS)} cuts, nothing recompiled\n", flush=True)
    return rows


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--width", type=int, default=256, help="of the GPT")
    parser.add_argument("--depth", type=int, default=4, help="of the GPT")
    parser.add_argument("--context", type=int, default=128, help="of the GPT")
    parser.add_argument("--hidden", type=int, default=384, help="of the MiniLM")
    parser.add_argument("--layers", type=int, default=6, help="of the MiniLM")
    parser.add_argument("--length", type=int, default=64, help="of the MiniLM's sentences")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=result_file, default=RESULTS / "truncated_cpu.csv")
    parser.add_argument("--smoke", action="store_true", help="tiny models, three rounds")
    args = parser.parse_args(argv)
    if args.smoke:
        args.width, args.depth, args.context, args.batch, args.rounds = 64, 4, 16, 2, 3
        args.hidden, args.layers, args.length = 32, 4, 16
    rows: list[Row] = []
    for make in (MODELS[name] for name in args.models):
        for adapters in (False, True):
            torch._dynamo.reset()
            torch.manual_seed(0)
            rows += measure(make(args, adapters), args.rounds)
            write_rows(args.out, "truncated", rows)
    print(f"median [quartiles] of {args.rounds} interleaved rounds, {torch.get_num_threads()} threads")
    return rows


if __name__ == "__main__":
    main(sys.argv[1:])
