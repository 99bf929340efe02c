"""Training loops of other libraries under `torchrun`: one run as a whole, one that goes on from its checkpoint.

    torchrun --nproc_per_node=2 tests/distributed/loops.py trainer FOLDER

Each rank writes what it has found into FOLDER/found-RANK.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import cacompile
from cacompile.controller import policy

WIDTH = 24
STEPS = 10
OPTIONS = {"warmup_steps": 2, "monitor_every": 2, "tolerance": 0.5, "block_rows": 16, "inner": "aot_eager"}


class Net(nn.Module):
    """As the Trainer calls it: a loss and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        y = x + self.down(F.gelu(self.up(x)))
        return {"loss": F.cross_entropy(y, labels), "logits": y}


def rows() -> tuple[Tensor, Tensor]:
    x = torch.randn(8 * STEPS, WIDTH, generator=torch.Generator().manual_seed(0))
    return x, x.argmax(-1)


def trainer(folder: Path, middle: bool) -> nn.Module:
    """middle: goes on from the checkpoint in the middle of the other run."""
    from transformers import Trainer, TrainingArguments

    from cacompile.integrations.transformers import ConvAwareCallback

    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend="gloo",
    )
    data = [{"x": x, "labels": label} for x, label in zip(*rows())]
    run = Trainer(Net(), args, train_dataset=data, callbacks=[ConvAwareCallback(OPTIONS)])
    run.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS // 2}") if middle else None)
    return run.model


def accelerate(folder: Path, middle: bool) -> nn.Module:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    original = Net()
    original.compile(backend="convaware", options=OPTIONS)
    optimizer: Any = torch.optim.AdamW(original.parameters(), lr=1e-3)
    data: Any = DataLoader(TensorDataset(*rows()), batch_size=4)
    model, optimizer, data = accelerator.prepare(original, optimizer, data)
    accelerator.register_for_checkpointing(cacompile.session(original))
    if middle:
        accelerator.load_state(str(folder / "state"))
    for i, (x, labels) in enumerate(data):
        if middle and i < STEPS // 2:
            continue
        if not middle and i == STEPS // 2:
            accelerator.save_state(str(folder / "state"))
        accelerator.backward(model(x, labels)["loss"])
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return original


def lightning(folder: Path, middle: bool) -> nn.Module:
    import lightning.pytorch as library

    from cacompile.integrations.lightning import ConvAwareCallback

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def configure_model(self) -> None:
            self.net.compile(backend="convaware", options=OPTIONS)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    saving = library.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=STEPS // 2, save_top_k=-1)
    module = Module()
    run = library.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_steps=STEPS,
        logger=False,
        callbacks=[ConvAwareCallback(), saving],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=True,
    )
    # an epoch ends where the checkpoint is: within one, Lightning begins its data anew
    data = DataLoader(TensorDataset(*(each[: 4 * STEPS] for each in rows())), batch_size=4)
    run.fit(module, data, ckpt_path=folder / f"step={STEPS // 2}.ckpt" if middle else None)
    return module


def weights(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def compare(which: str, folder: Path) -> dict[str, Any]:
    """What this rank finds of a whole run, of the other ranks', and of one that goes on from the middle."""
    found: list[tuple[nn.Module, Tensor]] = []
    for middle in (False, True):
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = globals()[which](folder, middle)
        found.append((model, weights(model)))
        dist.barrier()
    (whole, first), (_, second) = found
    each = [torch.empty_like(first) for _ in range(dist.get_world_size())]
    dist.all_gather(each, first)
    session = cacompile.session(whole)
    total, saved = session.flops
    masks = [cacompile.session(model).mask.tolist() for model, _ in found]
    return {
        "ranks": len(each),
        "steps": session.step_count,
        "apart": max(float((one - first).abs().max()) for one in each),
        "skipped": saved / total,
        "resumed": float((second - first).abs().max()),
        "masks": masks[0] == masks[1],
    }


def main(which: str, folder: Path) -> None:
    torch.set_num_threads(1)
    policy.FAST = np.inf  # few steps at high rates suffice
    result = compare(which, folder)
    (folder / f"found-{os.environ['RANK']}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
