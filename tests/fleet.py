"""One machine of a fleet: trains from what the cache holds. `fill FILE` writes the artifacts, `use FILE` reads them.

`train` does neither. A line for each step says what the weights are then; the last one counts.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import torch
from helpers import Block, compile_all, square_mean
from torch._dynamo.utils import counters

import cacompile

what, file = sys.argv[1], Path(sys.argv[-1])
if what == "use":
    torch.compiler.load_cache_artifacts(file.read_bytes())
torch.manual_seed(0)
model = Block()
run = compile_all(model, "convaware")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
x = torch.randn(8, 32)
for step in range(4):
    if step == 1:
        cacompile.session(model).pin(keep=0.5)
    if step == 3:
        cacompile.session(model).freeze("up")
    square_mean(run(x)).backward()
    optimizer.step()
    optimizer.zero_grad()
    print(hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest(), flush=True)
if what == "fill":
    found = torch.compiler.save_cache_artifacts()
    assert found is not None
    file.write_bytes(found[0])
compiled = sum(n for name, n in counters["cacompile"].items() if name.startswith("versions compiled"))
compiled += counters["inductor"]["fxgraph_cache_miss"]
print(
    f"hits {counters['aot_autograd']['autograd_cache_hit']}, misses {counters['aot_autograd']['autograd_cache_miss']}, "
    f"compiled {compiled}"
)
