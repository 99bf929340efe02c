"""Schedules that freeze and thaw: what they say, and that training under them is training with `requires_grad`."""

from __future__ import annotations

import copy
import importlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Block
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import cacompile
from cacompile import schedules
from cacompile.integrations import lightning as ours_lightning
from cacompile.integrations import transformers as ours_transformers
from cacompile.schedules import BlockCyclic, Follow, FreezeOut, GradualUnfreezing, RandomLayers, Schedule

STEPS = 12
LAYERS = [f"blocks.{i}" for i in range(4)]
SCHEDULES = {
    "gradual unfreezing": GradualUnfreezing(LAYERS, every=3),
    "freeze out": FreezeOut(LAYERS, steps=STEPS, first=0.3),
    "random layers": RandomLayers(LAYERS, live_layers=2, every=2, seed=7),
    "block cyclic": BlockCyclic(LAYERS, every=2),
}
OPTIONS = {"inner": "aot_eager", "block_rows": 16, "warmup_steps": 10**6}


class Net(nn.Module):
    """Four residual blocks between two layers that no schedule speaks of."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.dropout = dropout
        self.first, self.head = nn.Linear(32, 32), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = nn.functional.dropout(block(x), self.dropout, self.training)
        return self.head(x)


def by_requires_grad(model: nn.Module, schedule: Schedule, step: int) -> None:
    """What one writes without us."""
    frozen = [pattern for name in schedule.frozen(step) for pattern in (name, f"{name}.*")]
    for name, param in model.named_parameters():
        param.requires_grad_(not any(fnmatchcase(name, pattern) for pattern in frozen))


def test_the_first_example_is_true() -> None:
    (line,) = [line for line in (schedules.__doc__ or "").splitlines() if "schedule = " in line]
    assert isinstance(eval(line.partition("= ")[2], vars(schedules)), RandomLayers)
    for kind in schedules.KINDS.values():
        said = set(re.findall(r"(?:^|\. )\s*([a-z_]+): ", kind.__doc__, re.MULTILINE))
        assert said <= {field.name for field in fields(kind)}, kind


def test_what_is_live() -> None:
    def live(schedule: Schedule, steps: int = 10) -> list[list[int]]:
        return [sorted(schedule.live(step)) for step in range(steps)]

    assert live(GradualUnfreezing(LAYERS, every=2)) == [[3]] * 2 + [[2, 3]] * 2 + [[1, 2, 3]] * 2 + [[0, 1, 2, 3]] * 4
    assert live(BlockCyclic(LAYERS, every=2)) == [[3], [3], [2], [2], [1], [1], [0], [0], [3], [3]]
    assert live(BlockCyclic(LAYERS, every=1, upwards=True), 5) == [[0], [1], [2], [3], [0]]
    out = FreezeOut(LAYERS, steps=10, first=0.4)
    assert live(out) == [[0, 1, 2, 3]] * 4 + [[1, 2, 3]] * 2 + [[2, 3]] * 2 + [[3]] * 2
    assert [out.ends(i) for i in range(4)] == pytest.approx([0.4, 0.6, 0.8, 1.0]) and sorted(out.live(99)) == [3]
    assert FreezeOut(LAYERS, steps=10, first=0.4, cubed=True).ends(0) == pytest.approx(0.064)
    assert [out.rate(0, step) for step in (0, 2, 4, 5)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    drawn = live(RandomLayers(LAYERS, live_layers=2, every=3, seed=1), 300)
    assert all(len(each) == 2 for each in drawn) and drawn[::3] == drawn[1::3] == drawn[2::3]
    counts = [sum(i in each for each in drawn) for i in range(4)]
    assert min(counts) > 100, "every layer gets its turns"
    assert drawn == live(RandomLayers(LAYERS, live_layers=2, every=3, seed=1), 300)
    assert drawn != live(RandomLayers(LAYERS, live_layers=2, every=3, seed=2), 300)
    assert drawn[:3] == [[0, 2]] * 3, "the same in every process and version"


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_saved_as_plain_types(schedule: Schedule) -> None:
    assert Schedule.of(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GradualUnfreezing("blocks.*", every=1), r"GradualUnfreezing\(layers=...\) must be a list"),
        (lambda: GradualUnfreezing([], every=1), "must be a list"),
        (lambda: GradualUnfreezing([3], every=1), "must be names"),  # type: ignore[list-item]
        (lambda: BlockCyclic(LAYERS, every=0), r"BlockCyclic\(every=...\) must be an int >= 1, got 0"),
        (lambda: RandomLayers(LAYERS, live_layers=5), "between 1 and 4, got 5"),
        (lambda: RandomLayers(LAYERS, seed=-1), "seed.*got -1"),
        (lambda: FreezeOut(LAYERS, steps=5, first=1.5), "between 0 and 1, got 1.5"),
        (lambda: FreezeOut(LAYERS, steps=5, first=True), "between 0 and 1, got True"),
        (lambda: FreezeOut(LAYERS, steps=5, cubed="no"), r"FreezeOut\(cubed=...\) must be a bool, got 'no'"),  # type: ignore[arg-type]
        (lambda: BlockCyclic(LAYERS, every=1, upwards=1), "upwards.*must be a bool, got 1"),  # type: ignore[arg-type]
        (lambda: Schedule.of("LISA"), "must be one of BlockCyclic|GradualUnfreezing.*got 'LISA'"),  # type: ignore[arg-type]
        (lambda: Schedule.of(None), "to_dict.*got None"),  # type: ignore[arg-type]
        (lambda: Schedule.of({"kind": ["x"]}), r"unknown kind of schedule: \['x'\]"),
        (lambda: Follow(Net(), "BlockCyclic"), "schedule must be a Schedule.*got 'BlockCyclic'"),  # type: ignore[arg-type]
        (lambda: Follow(Net(), BlockCyclic(LAYERS, every=1))("a"), "step must be an int >= 0.*got 'a'"),  # type: ignore[arg-type]
        (lambda: Follow(Net(), BlockCyclic(LAYERS, every=1))(-1), "step.*got -1"),
        (lambda: Schedule.of({"kind": "Lisa"}), "unknown kind of schedule: 'Lisa'.*RandomLayers"),
        (lambda: Schedule.of({"kind": "BlockCyclic", "layers": ["a"]}), "every"),
        (lambda: Follow(Net(), BlockCyclic(["blocks.0", "block.1"], every=1)), "'block.1'.*did you mean 'blocks.1'"),
    ],
)
def test_what_is_wrong_is_said(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(cacompile.ConvAwareError, match=words):
        make()


@pytest.mark.thin(2)
@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.05, 0.9, weight_decay=0.1), torch.optim.AdamW])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_a_plain_loop_is_the_eager_one_bit_for_bit(schedule: Schedule, make: Any) -> None:
    model = Net()
    theirs, start = copy.deepcopy(model), copy.deepcopy(model)
    run = torch.compile(model, backend="convaware", options=OPTIONS)
    optimizers = [make(each.parameters()) for each in (model, theirs)]
    follow = Follow(run, schedule)
    batches = torch.randn(STEPS, 8, 32)

    def train(call: Any, optimizer: torch.optim.Optimizer, batch: Tensor, step: int) -> None:
        torch.manual_seed(step)
        call(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for step in range(STEPS):
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            follow()
            train(run, optimizers[0], batches[step], step)
        by_requires_grad(theirs, schedule, step)
        train(theirs, optimizers[1], batches[step], step)
        for (name, value), other in zip(model.state_dict().items(), theirs.state_dict().values()):
            assert torch.equal(value, other), f"step {step}: {name}"
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters())), "all had their turns"
    frozen = set(cacompile.session(model).frozen_since)
    assert frozen == {name for name, param in theirs.named_parameters() if not param.requires_grad}


def test_it_is_followed_whatever_froze_or_thawed_since() -> None:
    """A state that is loaded brings another set, and a user changes it, while the schedule's stays the same."""
    model = Net()
    session, follow = cacompile.session(model), Follow(model, BlockCyclic(["blocks.0", "blocks.1"], every=2))
    follow(0)
    state = session.state_dict()
    follow(2)
    wanted = set(session.frozen_since)
    session.load_state_dict(state)
    assert set(session.frozen_since) != wanted
    follow(2)
    assert set(session.frozen_since) == wanted
    session.thaw()
    follow(3)
    assert set(session.frozen_since) == wanted


def test_it_goes_on_after_a_resume() -> None:
    schedule = SCHEDULES["random layers"]

    def train(model: nn.Module, steps: range, state: Any = None) -> tuple[nn.Module, Any]:
        run, optimizer = (
            torch.compile(model, backend="convaware", options=OPTIONS),
            torch.optim.AdamW(model.parameters()),
        )
        session, follow = cacompile.session(model), Follow(model, schedule)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(state[1])
            session.load_state_dict(state[2])
        for step in steps:
            torch.manual_seed(step)
            follow()
            run(torch.randn(8, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, copy.deepcopy((model.state_dict(), optimizer.state_dict(), session.state_dict()))

    start = Net()
    whole, _ = train(copy.deepcopy(start), range(8))
    _, half = train(copy.deepcopy(start), range(5))
    again, _ = train(Net(), range(5, 8), half)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    assert cacompile.session(whole).frozen_since == cacompile.session(again).frozen_since


class ByHand(TrainerCallback):
    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        by_requires_grad(model, self.schedule, state.global_step)


def bert_layers() -> list[str]:
    return [f"bert.encoder.layer.{i}" for i in range(3)]


def hf_trainer(folder: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    random = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(64, (8,), generator=random), "labels": i % 2} for i in range(32)]
    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 8}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=3, num_attention_heads=2, **sizes))
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=6, save_steps=3,
        report_to="none", use_cpu=True, disable_tqdm=True, **settings,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data, callbacks=list(callbacks))


@pytest.fixture
def one_thread() -> Any:
    """Several add up an embedding's gradient in any order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_trainer(tmp_path: Path, one_thread: None) -> None:
    schedule = RandomLayers(bert_layers(), live_layers=1, every=1, seed=3)
    theirs = hf_trainer(tmp_path / "theirs", ByHand(schedule))
    theirs.train()

    def train(name: str, given: Schedule, checkpoint: Path | None = None, **settings: Any) -> nn.Module:
        convaware = ours_transformers.ConvAwareCallback(OPTIONS)
        freezing = ours_transformers.FreezingCallback(given)
        made = hf_trainer(tmp_path / name, convaware, freezing, **settings)
        made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return made.model

    ours = train("ours", schedule)
    assert len(cacompile.session(ours).frozen_since) == 32
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    saved = tmp_path / "ours" / "checkpoint-3"
    state = json.loads((saved / "trainer_state.json").read_text())["stateful_callbacks"]["FreezingCallback"]
    assert Schedule.of(state["args"]["schedule"]) == schedule
    again = train("ours", RandomLayers(bert_layers()), saved, restore_callback_states_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters()))


@pytest.mark.parametrize("package", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.slow)])
def test_lightning(package: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    library: Any = importlib.import_module(package)
    schedule = RandomLayers([f"net.blocks.{i}" for i in range(4)], live_layers=1, every=1, seed=3)

    class Module(library.LightningModule):
        def __init__(self, compiled: bool) -> None:
            super().__init__()
            self.net, self.compiled = Net(0.0), compiled  # checkpoints have no random state

        def configure_model(self) -> None:
            if self.compiled:
                self.net.compile(backend="convaware", options=OPTIONS)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class Hand(library.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            by_requires_grad(pl_module, schedule, trainer.global_step)

    def fit(name: str, *callbacks: Any, checkpoint: Path | None = None) -> nn.Module:
        torch.manual_seed(0)
        module = Module(name != "hand")
        saving = library.callbacks.ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = library.Trainer(
            accelerator="cpu", max_epochs=2, logger=False, callbacks=[*callbacks, saving], accumulate_grad_batches=2,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, DataLoader(TensorDataset(torch.randn(32, 32)), batch_size=4), ckpt_path=checkpoint)
        return module

    theirs = fit("hand", Hand())
    ours = fit("ours", ours_lightning.ConvAwareCallback(), ours_lightning.FreezingCallback(schedule))
    assert cacompile.session(ours).step_count == 8 and len(cacompile.session(ours).frozen_since) == 12
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters()))
    other = ours_lightning.FreezingCallback(RandomLayers([f"net.blocks.{i}" for i in range(4)], seed=4))
    with caplog.at_level(logging.WARNING, logger="cacompile"):
        checkpoint = tmp_path / "ours" / "step=4.ckpt"
        again = fit("again", ours_lightning.ConvAwareCallback(), other, checkpoint=checkpoint)
    assert "continues with the saved schedule" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters()))
