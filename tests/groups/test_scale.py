"""Groups of a Llama as large as 8B, whose weights take no memory: how many, and that time grows with nodes alone."""

from __future__ import annotations

import csv
import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from benchmarks.zoo import scale as zoo_scale
from cacompile.graph import compiled as graphs

WRITINGS = 12
"""Times that torch could write the joint graph as Python while we analyse it: a clock as slow as the machine."""


@functools.cache
def spent(layers: int) -> tuple[zoo_scale.Scale, float]:
    """What was found, and the processor's time for it, in writings of the same graph right before."""
    make_plan, ratios = graphs.make_plan, []

    def took(function: Callable[[], Any]) -> tuple[float, Any]:
        start = time.thread_time()
        result = function()
        return time.thread_time() - start, result

    def timed(params: Any, **kwargs: Any) -> Any:
        graph = params[0].placeholder.graph
        gc.collect()
        gc.disable()  # it would look through all that other tests have left
        try:
            writing = min(took(lambda: graph.python_code("self"))[0] for _ in range(3))
            seconds, plan = took(lambda: make_plan(params, **kwargs))
        finally:
            gc.enable()
        ratios.append(seconds / writing)
        return plan

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "make_plan", timed)
        scale = zoo_scale.measure(layers, rounds=3)
    return scale, min(ratios)


@pytest.mark.parametrize("layers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_groups_are_counted_out(layers: int) -> None:
    scale, _ = spent(layers)
    blocks = -(-zoo_scale.VOCABULARY // (4 * 128))
    assert (scale.heads, scale.neurons, scale.tokens) == (8 * layers, 14336 // 128 * layers, 2 * blocks)
    assert scale.coverage == pytest.approx(1.0)


def test_time_is_short() -> None:
    assert spent(2)[1] <= WRITINGS


@pytest.mark.slow
def test_time_is_linear() -> None:
    """The vocabulary, 502 groups of it, is the same for few layers and for many, so only growth is held to a line."""
    assert spent(8)[1] <= 1.5 * spent(2)[1]


def test_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_scale, "VOCABULARY", 1024)
    assert zoo_scale.main(["--layers", "1", "--rounds", "1", "--out", str(tmp_path)]) == 0
    with open(tmp_path / "zoo_scale.csv", newline="") as lines:
        [row] = csv.DictReader(lines)
    assert (row["layers"], row["heads"], row["neurons"], row["tokens"]) == ("1", "8", "112", "4")
    assert int(row["nodes"]) > 100
    assert float(row["analysis_s"]) > 0.0
