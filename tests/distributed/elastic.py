"""DistributedDataParallel under `torchrun --max-restarts`: a rank that ends in the middle, or one that is slower.

    torchrun --nproc_per_node=2 --max-restarts=1 tests/distributed/elastic.py FOLDER ENDS SLOW

Rank ENDS is killed in the first attempt, right after a reading; rank SLOW waits in each step. -1: none. Both go on from
the last state that rank 0 has saved. Each rank writes what it has found into FOLDER/found-RANK.json.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch import nn, optim
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import cacompile
from cacompile.controller import policy

WIDTH = 24
STEPS = 18
OPTIONS = {"warmup_steps": 2, "monitor_every": 4, "tolerance": 0.5, "block_rows": 16, "inner": "aot_eager"}


def main(folder: Path, ends: int, slow: int) -> None:
    torch.set_num_threads(1)
    policy.FAST = np.inf  # few steps at high rates suffice
    dist.init_process_group("gloo")
    rank, attempt = dist.get_rank(), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))
    wrapper = DistributedDataParallel(torch.compile(model, backend="convaware", options=OPTIONS))
    optimizer, session = optim.AdamW(model.parameters(), lr=1e-3), cacompile.session(model)
    state = folder / "state.pt"
    start = 0
    if state.exists():
        saved = torch.load(state)
        start = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        session.load_state_dict(saved["session"])
    dist.barrier()  # before it is written again
    masks = []
    for i in range(start, STEPS):
        if rank == ends and attempt == 0 and i == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == slow:
            time.sleep(0.2)
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(100 * i + rank))
        F.cross_entropy(wrapper(x), x.argmax(-1)).backward()
        optimizer.step()
        optimizer.zero_grad()
        masks.append(session.mask.tolist())
        if rank == 0 and i % 5 == 4:
            parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "session": session.state_dict()}
            torch.save({"step": i + 1, **parts}, folder / "next.pt")
            (folder / "next.pt").rename(state)
    weights = torch.cat([param.detach().flatten() for param in model.parameters()])
    found = {"start": start, "attempt": attempt, "masks": masks, "weights": weights.tolist()}
    (folder / f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
