"""The worker of `benchmarks.speed.host_time`: trains small models with the cacompile of one checkout, when asked to.

It is started by its path, with PYTHONPATH as the checkout's root, and imports nothing else of this project: another
checkout has other benchmarks. A line in, `[arm, steps]`, is a line out: seconds of all forward and backward passes, of
all optimizer steps, and the share of dW FLOPs that was skipped meanwhile. Before that it says where its package lies.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import cacompile

OPTIONS = {"inner": "aot_eager", "seed": 0, "monitor_every": 20}
ARMS: dict[str, dict[str, Any] | None] = {
    "aot_eager": None,
    "all on": OPTIONS,
    "half off": OPTIONS,
    "free": {**OPTIONS, "warmup_steps": 20, "tolerance": 1.0, "max_skip": 0.5},
}


class Arm:
    """A chain of small linear layers, each a group of its own, with its optimizer."""

    def __init__(self, name: str, layers: int, width: int) -> None:
        torch.manual_seed(0)
        chain = [module for _ in range(layers) for module in (nn.Linear(width, width), nn.Tanh())]
        self.plain = nn.Sequential(*chain)
        options = ARMS[name]
        backend = "aot_eager" if options is None else "convaware"
        self.model = torch.compile(self.plain, backend=backend, options=options)
        self.optimizer = torch.optim.AdamW(self.plain.parameters(), lr=1e-5)
        self.x = torch.randn(4, width)
        self.is_ours = options is not None
        self.run(2)  # compiles; the state of the optimizer is there from now on
        if name in ("all on", "half off"):
            cacompile.session(self.model).pin(keep=1.0 if name == "all on" else 0.5, seed=0)

    def step(self) -> tuple[float, float]:
        """Seconds of (forward and backward, the optimizer's step with what hangs on it)."""
        begin = time.perf_counter()
        loss: Tensor = self.model(self.x).square().mean()
        loss.backward()
        middle = time.perf_counter()
        self.optimizer.step()
        end = time.perf_counter()
        self.optimizer.zero_grad()
        return middle - begin, end - middle

    def run(self, steps: int) -> tuple[float, float, float]:
        saved, total = self._flops()
        passes, optimizer = map(sum, zip(*(self.step() for _ in range(steps)), strict=True))
        now_saved, now_total = self._flops()
        return passes, optimizer, (now_saved - saved) / (now_total - total) if now_total > total else 0.0

    def _flops(self) -> tuple[float, float]:
        if not self.is_ours or not self.optimizer.state:
            return 0.0, 0.0
        total, saved = cacompile.session(self.model).flops  # which earlier checkouts have under the same name
        return saved, total


def main(layers: int, width: int) -> None:
    torch.set_num_threads(1)
    arms = {name: Arm(name, layers, width) for name in ARMS}
    print(json.dumps(cacompile.__file__), flush=True)
    gc.collect()
    gc.disable()  # collected between turns, where nothing is timed
    for line in sys.stdin:
        name, steps = json.loads(line)
        print(json.dumps(arms[name].run(steps)), flush=True)
        gc.collect()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
