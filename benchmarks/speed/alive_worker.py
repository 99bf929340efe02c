"""The worker of `benchmarks.speed.alive`: compiles a model, and counts what is alive of that.

It is started by its path, with PYTHONPATH as a checkout's root, and imports nothing else of this project: another
checkout has other benchmarks. Prints where the package lies, and {state: {measure: count}}.
"""

from __future__ import annotations

import collections
import gc
import json
import sys
import tracemalloc
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor

import cacompile

KINDS: dict[str, Any] = {"nodes of graphs": fx.Node, "graphs": fx.Graph, "fake tensors": FakeTensor}


class Block(nn.Module):
    """A residual MLP block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def alive() -> dict[str, int]:
    """Bytes of Python's allocator since tracing began, and objects of the whole process."""
    for _ in range(3):
        gc.collect()
    kinds = collections.Counter(type(each) for each in gc.get_objects())
    counts = {name: sum(n for each, n in kinds.items() if issubclass(each, kind)) for name, kind in KINDS.items()}
    return {"bytes": tracemalloc.get_traced_memory()[0], "objects": sum(kinds.values()), **counts}


def train(backend: str, width: int, depth: int) -> tuple[nn.Module, Any, Tensor]:
    model, x = nn.Sequential(*(Block(width) for _ in range(depth))), torch.randn(16, width)
    run: Any = torch.compile(model, backend=backend)
    run(x).square().mean().backward()
    return model, run, x


def main(backend: str, width: int, depth: int) -> dict[str, dict[str, int]]:
    torch.manual_seed(0)
    others = train(backend, 32, 1)  # modules that are imported when something is first compiled are not counted
    tracemalloc.start()
    before = alive()
    model, run, x = train(backend, width, depth)
    states = {"compiled": alive()}
    if backend == "convaware":
        cacompile.session(model).pin(keep=0.5)
        run(x).square().mean().backward()
        states["masked version made"] = alive()
    del others
    return {state: {name: n - before[name] for name, n in counts.items()} for state, counts in states.items()}


if __name__ == "__main__":
    arguments = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    print(json.dumps([str(cacompile.__file__), main(*arguments)]))
