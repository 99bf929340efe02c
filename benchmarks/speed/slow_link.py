"""Bytes on the wire and step time of two processes whose link is slow on purpose: DDP and FSDP2.

    sudo python -m benchmarks.speed.slow_link                      # Linux, with `ip` and `tc`
    sudo python -m benchmarks.speed.slow_link --smoke --out /tmp/x # checks that the benchmark itself works

Two network namespaces, a pair of virtual interfaces between them, and a token bucket filter on each. Bytes are those
that the interface of rank 0 has sent, with all that TCP adds. Arms: `dense` (convaware, everything on), `half` (every
second group off), `frozen` (the lower half of the blocks, of which no gradient is computed); of each also with
`reduce_less`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import cacompile
from benchmarks.lib.rows import RESULTS, Row, result_file, write_rows
from benchmarks.lib.timing import Spread, interleave, ratios

DEPTH = 6
OPTIONS = {"monitor_every": 2, "warmup_steps": 2, "block_rows": 32}
READY = 8
"""Steps until all ranks hold a pin: decided at a reading, taken over a step later."""
WRAPPERS = ("ddp", "ddp, reduce_less", "fsdp2", "fsdp2, reduce_less")
ARMS = [(how, what) for how in WRAPPERS for what in ("dense", "half", "frozen")]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Arm:
    """A model of its own, trained by one of the two wrappers."""

    def __init__(self, how: str, what: str, args: argparse.Namespace, sent: Callable[[], int]) -> None:
        torch.manual_seed(0)
        self.module, self.sent = Model(args.width), sent
        self.batch = torch.randn(args.batch, args.width)
        for block in self.module.blocks:
            block.compile(backend="convaware", options=OPTIONS)
        self.model: Any = self.module
        if how.startswith("fsdp2"):
            for block in self.module.blocks:
                fully_shard(block)
            fully_shard(self.module)
        else:
            self.model = DistributedDataParallel(self.module)
        if how.endswith("reduce_less"):
            cacompile.reduce_less(self.model)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9)
        self.bytes: list[float] = []
        self.step()
        session = cacompile.session(self.module)
        session.pin({name: i % 2 == 0 or what != "half" for i, name in enumerate(session.groups)})
        if what == "frozen":
            session.freeze("blocks.[0-2].*")
        for _ in range(READY):
            self.step()
        self.bytes.clear()

    def step(self) -> None:
        before = self.sent()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        dist.barrier()  # what this rank has sent has been taken by then
        self.bytes.append(self.sent() - before)


def work(rank: int, args: argparse.Namespace) -> None:
    """One of the two processes; the first writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address(0)}:29501", rank=rank, world_size=2)
    counter = Path(f"/sys/class/net/{interface(args.name, rank)}/statistics/tx_bytes")
    arms = {f"{how}: {what}": Arm(how, what, args, lambda: int(counter.read_text())) for how, what in ARMS}
    seconds = interleave({name: arm.step for name, arm in arms.items()}, args.rounds)
    if rank == 0:
        args.found.write_text(json.dumps({"seconds": seconds, "bytes": {n: a.bytes for n, a in arms.items()}}))
    dist.destroy_process_group()


def address(rank: int) -> str:
    return f"10.213.77.{rank + 1}"


def interface(name: str, rank: int) -> str:
    return f"{name}v{rank}"


@contextlib.contextmanager
def slow_link(name: str, rate: str) -> Iterator[None]:
    """Network namespaces `name0` and `name1`, with a link of this rate between them."""
    run = functools.partial(subprocess.run, check=True, capture_output=True)
    try:
        for rank in (0, 1):
            run(["ip", "netns", "add", f"{name}{rank}"])
        ends = [interface(name, rank) for rank in (0, 1)]
        run(["ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1]])
        for rank, end in enumerate(ends):
            inside = ["ip", "netns", "exec", f"{name}{rank}"]
            run(["ip", "link", "set", end, "netns", f"{name}{rank}"])
            run([*inside, "ip", "addr", "add", f"{address(rank)}/24", "dev", end])
            run([*inside, "ip", "link", "set", end, "up"])
            run([*inside, "ip", "link", "set", "lo", "up"])
            run(
                [
                    *inside,
                    "tc",
                    "qdisc",
                    "add",
                    "dev",
                    end,
                    "root",
                    "tbf",
                    "rate",
                    rate,
                    "burst",
                    "64kb",
                    "latency",
                    "1s",
                ]
            )
        yield
    finally:
        for rank in (0, 1):
            subprocess.run(["ip", "netns", "del", f"{name}{rank}"], capture_output=True, check=False)


def main(argv: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", default="100mbit", help="of the link, as tc has it")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=result_file, default=RESULTS / "slow_link_cpu.csv")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, three rounds")
    for internal in ("--worker", "--name", "--found"):
        parser.add_argument(
            internal, help=argparse.SUPPRESS, type={"--worker": int, "--found": Path}.get(internal, str)
        )
    args = parser.parse_args(argv)
    if args.smoke:
        args.width, args.batch, args.rounds = 64, 8, 3
    if args.worker is not None:
        work(args.worker, args)
        return []
    name = f"ca{os.getpid()}"
    with tempfile.TemporaryDirectory() as folder, slow_link(name, args.rate):
        found = Path(folder) / "found.json"
        own = [sys.executable, "-m", "benchmarks.speed.slow_link", *(sys.argv[1:] if argv is None else argv)]
        workers = [
            subprocess.Popen(
                ["ip", "netns", "exec", f"{name}{rank}", *own]
                + ["--worker", str(rank), "--name", name, "--found", str(found)],
                env={**os.environ, "GLOO_SOCKET_IFNAME": interface(name, rank), "OMP_NUM_THREADS": "1"},
            )
            for rank in (0, 1)
        ]
        codes = [worker.wait() for worker in workers]
        if any(codes):
            raise SystemExit("a process has failed")
        results = json.loads(found.read_text())
    seconds, sent = results["seconds"], results["bytes"]
    case = f"MLP of {DEPTH} blocks, width {args.width}, {args.batch} rows a rank, {args.rate}"
    rows: list[Row] = []
    table = []
    for arm in seconds:
        dense = f"{arm.split(':')[0].split(',')[0]}: dense"
        rows += [(case, arm, "step", "s", Spread.of(seconds[arm])), (case, arm, "sent", "bytes", Spread.of(sent[arm]))]
        time, share = ratios(seconds[arm], seconds[dense]), ratios(sent[arm], sent[dense])
        rows += [(case, arm, "step", "ratio to dense", time), (case, arm, "sent", "ratio to dense", share)]
        table.append((arm, f"{Spread.of(sent[arm]).median / 1e6:.2f}", share, time))
    print(case)
    print(tabulate(table, headers=["arm", "MB sent a step", "of dense", "step / dense"]))
    print(f"median [quartiles] of {args.rounds} interleaved rounds")
    write_rows(args.out, "slow_link", rows)
    return rows


if __name__ == "__main__":
    main()
