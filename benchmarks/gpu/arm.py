"""One arm of a model's step times, in a process of its own: compiles ahead, waits for its turn, then steps as asked."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx

import cacompile
from benchmarks.gpu.models import PRESETS
from benchmarks.gpu.timing import event
from benchmarks.lib.timing import synchronize
from cacompile import backend
from cacompile.graph import compiled

KINDS = ("inductor", "convaware", "oracle")
"""oracle: Inductor, with every weight of a linear layer or a convolution frozen before compiling."""

Backend = Callable[..., Callable[..., Any]]


def inductor(gm: torch.fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None) -> Callable[..., Any]:
    """What `torch.compile` does by default."""
    return compile_fx(gm, inputs, config_patches=list_mode_options(mode) if mode else None)


def convaware(gm: torch.fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
    """Our backend, with the masked backward compiled at once and not when first wanted."""
    compiled_graphs = []

    def remember(*args: Any, **kwargs: Any) -> Any:
        compiled_graphs.append(made := compile_graph(*args, **kwargs))
        return made

    compile_graph = compiled.compile_graph
    with mock.patch.object(compiled, "compile_graph", remember):
        run = backend.convaware(gm, inputs, **settings)
    for graph, _ in compiled_graphs:
        if graph.backward is not None:
            graph.backward.masked_version()
    return run


def gated(backend: Backend, pipe: Connection) -> Backend:
    """A backend whose first graph, once compiled, says so and waits for the word: until then no kernel runs."""
    begin, waited = time.perf_counter(), False

    def compile_and_wait(gm: torch.fx.GraphModule, inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
        compiled = backend(gm, inputs, **settings)

        def run(*args: Any) -> Any:
            nonlocal waited
            if not waited:
                waited = True
                pipe.send(time.perf_counter() - begin)
                pipe.recv()
                if torch.cuda.is_available():
                    with contextlib.suppress(PermissionError):
                        os.nice(-10)
            return compiled(*args)

        return run

    return compile_and_wait


def freeze_weights(model: nn.Module) -> None:
    """The static oracle: no gradient for what a matrix product or a convolution computes one."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.requires_grad_(False)


class Stepper:
    """Whole training steps of one model, timed by events."""

    def __init__(self, pipe: Connection, name: str, kind: str, graphs: bool, device: str, tiny: bool) -> None:
        preset = PRESETS[name]
        self.device, self.is_ours, self.bf16 = device, kind == "convaware", preset.bf16_weights
        model, self.batch = preset.build(device, tiny=tiny)
        if kind == "oracle":
            freeze_weights(model)
        mode = "reduce-overhead" if graphs else None
        backend = gated(convaware if self.is_ours else inductor, pipe)
        self.model = torch.compile(model, backend=backend, mode=mode, dynamic=False)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(self) -> tuple[Any, Any, Any]:
        """Events before the forward pass, after the backward pass, after the optimizer."""
        marks = tuple(event(self.device) for _ in range(3))
        autocast = contextlib.nullcontext() if self.bf16 else torch.autocast(self.device, torch.bfloat16)
        torch.compiler.cudagraph_mark_step_begin()
        marks[0].record()
        with autocast:
            loss = self.model(*self.batch)
        loss.backward()
        marks[1].record()
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks[2].record()
        return marks

    def pin(self, keep: float | None, seed: int) -> None:
        if self.is_ours and keep is not None:
            cacompile.session(self.model).pin(keep=keep, seed=seed)

    def warm(self, keeps: Sequence[float | None]) -> float:
        """Every version and every density until nothing is compiled, tuned or captured any more; peak memory in GiB."""
        for keep in keeps:
            self.pin(keep, seed=0)
            for _ in range(4):
                self.step()
        synchronize(self.device)
        return torch.cuda.max_memory_allocated() / 2**30 if self.device == "cuda" else 0.0

    def round(self, keep: float | None, seed: int, steps: int) -> tuple[list[float], list[float], float]:
        """Milliseconds of forward and backward, and of the whole step, in each step; share of dW FLOPs skipped."""
        self.pin(keep, seed)
        self.step()  # the first with another mask
        synchronize(self.device)
        before = self._flops()
        marks = [self.step() for _ in range(steps)]
        synchronize(self.device)
        total, saved = (after - then for after, then in zip(self._flops(), before))
        passes = [begin.elapsed_time(middle) for begin, middle, _ in marks]
        return passes, [begin.elapsed_time(end) for begin, _, end in marks], saved / total if total else 0.0

    def _flops(self) -> tuple[float, float]:
        return cacompile.session(self.model).flops if self.is_ours else (0.0, 0.0)


def run_arm(pipe: Connection, name: str, kind: str, graphs: bool, device: str, tiny: bool) -> None:
    """Sends the seconds until compiled; once told to go on, warms up as told, then answers a round at a time."""
    if device == "cpu":
        torch.set_num_threads(1)
    else:
        os.nice(10)  # others are being timed while this one compiles
    stepper = Stepper(pipe, name, kind, graphs, device, tiny)
    # the backward at once, not when it first runs, so that the wait comes after all compiling
    with functorch_config.patch(force_non_lazy_backward_lowering=True):
        stepper.step()
    pipe.send(stepper.warm(pipe.recv()))
    while True:
        pipe.send(stepper.round(*pipe.recv()))
