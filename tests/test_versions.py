"""The guarded version is compiled late, from any thread, as if it had been compiled with the dense one."""

from __future__ import annotations

import copy
import threading
import time
from typing import Any

import pytest
import torch
from helpers import Block, assert_masked, compile_all, masks, pin_mixed, train_step
from torch import fx
from torch._guards import TracingContext
from torch._inductor import config as inductor_config

import cacompile
from cacompile import region, versions
from cacompile.versions import BackwardVersions, Guarded


class Spied(BackwardVersions):
    """Notes the surroundings in which each version is compiled."""

    made: list[Spied]

    def __init__(self, *args: Any, compile_inner: Any, **kwargs: Any) -> None:
        self.seen: list[dict[str, Any]] = []

        def compile_and_note(gm: fx.GraphModule, inputs: Any, **settings: Any) -> Any:
            time.sleep(0.05)  # long enough for a second thread to come by
            output = gm.graph.output_node()
            with inductor_config.patch(max_fusion_size=7):
                patched = inductor_config.max_fusion_size
            self.seen.append(
                {
                    "fusion": inductor_config.max_fusion_size,
                    "patched": patched,
                    "context": TracingContext.try_get(),
                    "grad": torch.is_grad_enabled(),
                    "outputs": len(output.args[0]),
                    "descs": len(output.meta.get("desc", output.args[0])),
                }
            )
            return compile_inner(gm, inputs, **settings)

        Spied.made.append(self)
        super().__init__(*args, compile_inner=compile_and_note, **kwargs)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spied, "made", [], raising=False)
    monkeypatch.setattr(region, "BackwardVersions", Spied)


def in_threads(count: int, call: Any) -> list[Any]:
    """What `call` gives in each of so many threads that start together."""
    barrier, found = threading.Barrier(count), []

    def work() -> None:
        barrier.wait()
        found.append(call())

    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.skipif(torch.__version__ < "2.12", reason="Inductor's settings are the process's own in torch 2.11")
@pytest.mark.usefixtures("spied")
def test_config_of_the_main_thread_is_seen_from_another() -> None:
    model, x = Block(), [torch.randn(8, 32)]
    twin = copy.deepcopy(model)
    ours, theirs = (model, compile_all(model, "convaware")), (twin, compile_all(twin, "inductor"))
    with inductor_config.patch(max_fusion_size=3):
        train_step(ours, x)
        dense = train_step(theirs, x)
    (made,) = Spied.made
    assert in_threads(1, lambda: inductor_config.max_fusion_size)[0] != 3
    (guarded,) = in_threads(1, made.guarded)
    assert guarded is not None and guarded.masked == {"up.weight", "down.weight"}
    first, late = made.seen
    assert first["fusion"] == late["fusion"] == 3 and late["patched"] == 7
    assert late["context"] is first["context"] is not None and not late["grad"]
    for seen in made.seen:
        assert seen["outputs"] == seen["descs"]
    pin_mixed(cacompile.session(model))
    assert_masked(train_step(ours, x), dense, masks(model))
    assert len(made.seen) == 2


@pytest.mark.usefixtures("spied")
def test_two_threads_get_one_version_whole() -> None:
    model = Block()
    train_step((model, compile_all(model, "convaware")), [torch.randn(8, 32)])
    (made,) = Spied.made
    one, other = in_threads(2, made.guarded)
    assert one is other and isinstance(one, Guarded) and one.masked
    assert len(made.seen) == 2, "dense and guarded, each compiled once"


def test_output_loses_its_description_with_the_handle() -> None:
    graph = fx.Graph()
    a, handle, b = (graph.placeholder(name) for name in ("a", "handle", "b"))
    graph.output((a, handle, b)).meta.update(desc=["of a", "of handle", "of b"], user_visible_output_idxs=[0, 2])
    gm = fx.GraphModule(torch.nn.Module(), graph)
    assert versions._erase_handle(gm, 1) == 1
    output = gm.graph.output_node()
    assert [n.name for n in output.args[0]] == ["a", "b"]
    assert output.meta["desc"] == ["of a", "of b"] and output.meta["user_visible_output_idxs"] == [0, 1]
