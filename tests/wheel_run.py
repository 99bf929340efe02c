"""A training run for an installed wheel, which needs nothing else: no checkout, no extra.

python wheel_run.py --seconds 120    # by Inductor, with a tolerance at which half of a toy is skipped
python wheel_run.py --quick          # a few steps by torch's own operations, under a pinned mask
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch
from jinja2 import PackageLoader
from torch import nn

import cacompile


class Net(nn.Module):
    """Width 64, two blocks of 512 hidden neurons: four groups each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64)) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def train(seconds: float, quick: bool) -> None:
    torch.manual_seed(0)
    model = Net()
    options: dict[str, object] = {"inner": "aot_eager"} if quick else {"tolerance": 0.3}
    run = torch.compile(model, backend="convaware", options=options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses: list[float] = []
    began = time.perf_counter()
    while len(losses) < (4 if quick else 60) or (not quick and time.perf_counter() - began < seconds):
        if quick and len(losses) == 2:
            cacompile.session(model).pin({"blocks.0.neurons[0:128]": False})
        x = torch.randn(256, 64)
        loss = (run(x) - x.roll(1, 1).sin()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    found = cacompile.status(model)
    assert losses[-1] < losses[0], losses
    assert 0 < found.saved_flops < found.dw_flops, found
    torch.save(cacompile.session(model).state_dict(), "session.pt")
    cacompile.report_state(torch.load("session.pt", weights_only=True), "run.csv")
    assert "blocks.0.neurons" in Path("run.csv").read_text(encoding="utf-8") or quick
    assert {"run.html.jinja", "explanation.html.jinja"} <= set(PackageLoader("cacompile.pages").list_templates())
    print(f"Python {platform.python_version()}, torch {torch.__version__}, {cacompile.__file__}")
    print(f"{len(losses)} steps, loss {losses[0]:.4f} to {losses[-1]:.4f}, "
          f"{found.saved_flops / found.dw_flops:.1%} of dW FLOPs skipped")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    train(args.seconds, args.quick)


if __name__ == "__main__":
    main()
