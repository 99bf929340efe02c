"""Training loops of other libraries, run as they come: what is logged, what is saved, and resuming bit for bit."""

from __future__ import annotations

import csv
import importlib
import logging
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import TorchDynamoPlugin
from helpers import mlp
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
import cacompile.integrations.accelerate
from cacompile.integrations.transformers import FILE, ConvAwareCallback

STEPS = 6
OPTIONS = {"warmup_steps": 2, "monitor_every": 1, "tolerance": 1.0, "block_rows": 16, "inner": "aot_eager"}
LOGGED = {f"convaware/{name}" for name in cacompile.sessions.status.LOGGED}

pytestmark = pytest.mark.usefixtures("however_fast")


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """One thread, as several add up an embedding's gradient in any order; and nothing left of earlier Accelerators."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def assert_equal_runs(model: nn.Module, other: nn.Module) -> None:
    """Weights, masks and what was saved, bit for bit; and something was skipped."""
    expected = other.state_dict()
    assert {name for name, value in model.state_dict().items() if not torch.equal(value, expected[name])} == set()
    ours, theirs = cacompile.session(model), cacompile.session(other)
    assert torch.equal(ours.mask, theirs.mask) and torch.equal(ours.keep, theirs.keep)
    assert ours.flops == theirs.flops and ours.flops[1] > 0
    assert ours.step_count == theirs.step_count


def said(caplog: Any) -> list[str]:
    """What we have warned of."""
    ours = (record for record in caplog.records if record.name.startswith("cacompile"))
    return [record.getMessage() for record in ours if record.levelno >= logging.WARNING]


class Sees(TrainerCallback):
    """What a reporter that stands before us in the list is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def trainer(
    folder: Path, callback: ConvAwareCallback, reporter: TrainerCallback | None = None, **settings: Any
) -> Trainer:
    """A small BERT, with dropout, on random tokens."""
    random = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(64, (8,), generator=random), "labels": i % 2} for i in range(32)]
    set_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 8}
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=1, num_attention_heads=2, **sizes))
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        max_steps=STEPS,
        save_steps=STEPS // 2,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model, args, train_dataset=data, callbacks=[reporter or Sees(), callback])


@pytest.mark.thin(2)
@pytest.mark.parametrize("torch_compile", [False, True], ids=["the callback compiles", "accelerate compiles"])
@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_trainer_logs_and_resumes_bit_for_bit(torch_compile: bool, inner: str, tmp_path: Path, caplog: Any):
    options = {**OPTIONS, "inner": inner}
    how = {"torch_compile": True, "torch_compile_backend": "convaware"} if torch_compile else {}
    sees = Sees()
    whole = trainer(tmp_path / "run", ConvAwareCallback(options), sees, **how)
    whole.train()
    assert cacompile.session(whole.model).config == cacompile.Config(**options)
    assert cacompile.session(whole.model).losses[0].tolist() == list(range(1, STEPS + 1))
    notes = [record.getMessage() for record in caplog.records if record.name == "cacompile.notes"]
    assert len(notes) == 1 and re.match(r"convaware: \d+ of \d+ weights can be skipped, from step 2 on", notes[0])
    losses = [logs for logs in sees.logs if "loss" in logs]
    assert len(losses) == STEPS and all(logs.keys() >= LOGGED for logs in losses)
    assert [logs.keys() >= LOGGED for logs in whole.state.log_history] == STEPS * [True] + [False]
    assert losses[0]["convaware/skipped_dw"] == 0.0 < losses[-1]["convaware/skipped_dw"] <= 1.0

    def resumed(output: str, place: Path | bool, **settings: Any) -> Trainer:
        again = trainer(tmp_path / output, ConvAwareCallback(options), **how, **settings)
        again.train(resume_from_checkpoint=str(place) if isinstance(place, Path) else place)
        return again

    middle = f"checkpoint-{STEPS // 2}"
    saved = tmp_path / "run" / middle
    elsewhere = shutil.copytree(saved, tmp_path / "elsewhere")
    shutil.copytree(saved, tmp_path / "half" / middle)
    losing = shutil.copytree(saved, tmp_path / "losing" / middle)
    (losing / FILE).unlink()
    with caplog.at_level(logging.WARNING, logger="cacompile"):
        for again in (
            resumed("run", saved),
            resumed("half", True),
            resumed("other", elsewhere, resume_from_checkpoint=str(elsewhere)),
        ):
            assert_equal_runs(again.model, whole.model)
            rest = [logs for logs in again.state.log_history if "loss" in logs]
            assert rest == [logs for logs in whole.state.log_history if "loss" in logs]
        assert said(caplog) == []
        for output, place, reason in (("losing", losing, f"has no {FILE}"), ("other", elsewhere, "is not in")):
            again = resumed(output, place)
            assert cacompile.session(again.model).step_count < STEPS, "its groups should have started anew"
            assert reason in said(caplog)[-1]


@pytest.mark.parametrize(
    ("options", "settings", "words"),
    [
        ({"tolerence": 0.1}, {"torch_compile": True, "torch_compile_backend": "convaware"}, "tolerence"),
        ({}, {"torch_compile": True, "torch_compile_backend": "inductor"}, "must be 'convaware'.*got 'inductor'"),
        (OPTIONS, {"compiled": True}, "compiled already"),
    ],
)
def test_trainer_is_told_what_does_not_fit(options: Any, settings: dict[str, Any], words: str, tmp_path: Path):
    compiled = settings.pop("compiled", False)

    def train() -> None:
        made = trainer(tmp_path, ConvAwareCallback(options), **settings)
        if compiled:
            made.model.compile(backend="convaware")
        made.train()

    with pytest.raises(cacompile.ConvAwareError, match=words):
        train()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tolerance": 2}, "'tolerance' must be between"),
        ({"keep": 3}, "'keep' must be a tuple"),
        ({"max_autotun": True}, "did you mean 'max_autotune'"),
        ({"nothing_like_it": 1}, "known: block_rows, budget, estimate, .*warmup_steps$"),
        (3, "options must be a dict"),
    ],
)
def test_options_are_checked_when_the_callback_is_made(options: Any, words: str):
    with pytest.raises(cacompile.ConvAwareError, match=words):
        ConvAwareCallback(options)


def test_a_schedule_is_checked_when_the_callback_is_made():
    from cacompile.integrations import lightning, transformers

    for module in (lightning, transformers):
        with pytest.raises(cacompile.ConvAwareError, match="unknown kind of schedule: 'GradualUnfreesing'; did you"):
            module.FreezingCallback({"kind": "GradualUnfreesing", "layers": [], "every": 1})
        made = module.FreezingCallback({"kind": "GradualUnfreezing", "layers": ["a", "b"], "every": 1})
        assert made.schedule.frozen(0) == ("a",)


def test_a_model_compiled_already_is_told_of_when_the_trainer_is_made(tmp_path: Path):
    made = trainer(tmp_path, ConvAwareCallback())
    made.model.compile(backend="convaware")
    with pytest.raises(cacompile.ConvAwareError, match="compiled already"):
        Trainer(made.model, made.args, callbacks=[ConvAwareCallback(OPTIONS)])


ACCELERATED = {
    "plugin": {"dynamo_plugin": {"backend": "convaware", "options": OPTIONS}},
    "compiled_graphs": {
        "dynamo_plugin": {"backend": "convaware", "options": OPTIONS, "use_regional_compilation": True}
    },
    "environment": {"env": True},
    "before prepare": {},
}


def accelerated(how: str, folder: Path, monkeypatch: Any, *, save: bool, load: bool) -> nn.Module:
    """A loop as Accelerate's documentation writes it, 2 micro-batches a step."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    settings = dict(ACCELERATED[how])
    if settings.pop("env", False):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "convaware")
    if "dynamo_plugin" in settings:
        settings["dynamo_plugin"] = TorchDynamoPlugin(**settings["dynamo_plugin"])
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **settings)
    torch.manual_seed(0)
    original: Any = Twice()
    optimizer = torch.optim.AdamW(original.parameters(), lr=1e-3)
    data = DataLoader(TensorDataset(torch.randn(8 * STEPS * 2, 32)), batch_size=8)
    if how == "before prepare":
        original = torch.compile(original, backend="convaware", options=OPTIONS)
    model, optimizer, data = accelerator.prepare(original, optimizer, data)
    accelerator.register_for_checkpointing(cacompile.session(model))
    half = STEPS  # micro-batches
    if load:
        accelerator.load_state(folder)
    for i, (x,) in enumerate(data):
        if load and i < half:
            continue
        if save and i == half:
            accelerator.save_state(folder)
        with accelerator.accumulate(model):
            accelerator.backward(model(x).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return model


class Twice(nn.Module):
    """Two equal blocks, to be compiled by region."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([mlp(), mlp()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("how", ACCELERATED)
def test_accelerate_accumulates_and_resumes_bit_for_bit(how: str, tmp_path: Path, monkeypatch: Any):
    whole = accelerated(how, tmp_path, monkeypatch, save=True, load=False)
    session = cacompile.session(whole)
    assert session.step_count == STEPS
    if how == "environment":  # has no way to give options, so nothing is skipped in so few steps
        assert session.config == cacompile.Config() and session.mask.all()
        return
    assert_equal_runs(accelerated(how, tmp_path, monkeypatch, save=False, load=True), whole)


def test_accelerate_still_refuses_other_names():
    for name in ("convawere", "cona"):
        with pytest.raises(ValueError, match=name.upper()):
            TorchDynamoPlugin(backend=name)
    plugin = TorchDynamoPlugin(backend="convaware", options={"tolerance": 0.1})
    assert plugin.to_kwargs() == {"backend": "convaware", "options": {"tolerance": 0.1}}


@pytest.mark.parametrize("package", ["lightning.pytorch", pytest.param("pytorch_lightning", marks=pytest.mark.slow)])
def test_lightning_logs_and_resumes_bit_for_bit(package: str, tmp_path: Path):
    from cacompile.integrations.lightning import ConvAwareCallback

    library: Any = importlib.import_module(package)
    loggers: Any = importlib.import_module(f"{package}.loggers")

    class Module(library.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Twice()

        def configure_model(self) -> None:
            self.net.compile(backend="convaware", options=OPTIONS)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def fit(name: str, checkpoint: Path | None = None) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        module = Module()
        data = DataLoader(TensorDataset(torch.randn(8 * STEPS // 2, 32)), batch_size=8)
        saving = library.callbacks.ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = library.Trainer(
            accelerator="cpu",
            max_steps=STEPS,
            gradient_clip_val=1.0,
            logger=loggers.CSVLogger(tmp_path, name=name),
            log_every_n_steps=1,
            callbacks=[ConvAwareCallback(), saving],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data, ckpt_path=checkpoint)
        return module, trainer

    whole, trainer = fit("whole")
    assert cacompile.session(whole).step_count == STEPS == trainer.global_step
    with open(Path(trainer.logger.log_dir) / "metrics.csv") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == STEPS and rows[0].keys() >= LOGGED
    assert float(trainer.progress_bar_metrics["saved"]) == pytest.approx(cacompile.status(whole).saved_step, abs=0.1)
    assert cacompile.session(whole).losses[0].tolist() == list(range(1, STEPS + 1))
    assert float(rows[0]["convaware/skipped_dw"]) == 0.0 < float(rows[-1]["convaware/skipped_dw"])
    again, _ = fit("again", tmp_path / "whole" / f"step={STEPS // 2}.ckpt")
    assert_equal_runs(again, whole)


@pytest.mark.parametrize(
    ("module", "without"),
    [
        ("transformers", ["transformers"]),
        ("accelerate", ["accelerate", "accelerate.utils"]),
        ("lightning", ["lightning.pytorch.callbacks", "pytorch_lightning.callbacks"]),
    ],
)
def test_a_missing_library_is_named_with_its_extra(module: str, without: list[str], monkeypatch: Any):
    for name in without:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"cacompile.integrations.{module}", raising=False)
    with pytest.raises(ImportError, match=rf"needs {module}.*cacompile\[{module}\]"):
        importlib.import_module(f"cacompile.integrations.{module}")
