"""Groups of a Llama as large as 8B, whose weights take no memory: how many, and that time grows with nodes alone."""

from __future__ import annotations

import csv
import functools
import gc
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from benchmarks.zoo import scale as zoo_scale
from cacompile.graph import compiled as region

PER_NODE = 1.0 / 10_000
"""Seconds that a node of the joint graph may take."""


@functools.cache
def spent(layers: int) -> tuple[zoo_scale.Scale, float]:
    """What was found, and the processor's seconds: others on the machine do not count."""
    make_plan, seconds = region.make_plan, []

    def timed(*args: Any, **kwargs: Any) -> Any:
        gc.collect()
        gc.disable()  # it would look through all that other tests have left
        try:
            start = time.thread_time()
            return make_plan(*args, **kwargs)
        finally:
            seconds.append(time.thread_time() - start)
            gc.enable()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(region, "make_plan", timed)
        scale = zoo_scale.measure(layers, rounds=3)
    return scale, min(seconds)


@pytest.mark.parametrize("layers", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_groups_are_counted_out(layers: int) -> None:
    scale, _ = spent(layers)
    blocks = -(-zoo_scale.VOCABULARY // (4 * 128))
    assert (scale.heads, scale.neurons, scale.tokens) == (8 * layers, 14336 // 128 * layers, 2 * blocks)
    assert scale.coverage == pytest.approx(1.0)


def test_time_is_short() -> None:
    scale, seconds = spent(2)
    assert seconds / scale.nodes <= PER_NODE


@pytest.mark.slow
def test_time_is_linear() -> None:
    """The vocabulary, 502 groups of it, is the same for few layers and for many, so only growth is held to a line."""
    (few, before), (many, after) = spent(2), spent(8)
    assert after / many.nodes <= PER_NODE
    assert after / many.nodes <= 2 * before / few.nodes


def test_writes_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo_scale, "VOCABULARY", 1024)
    assert zoo_scale.main(["--layers", "1", "--rounds", "1", "--out", str(tmp_path)]) == 0
    with open(tmp_path / "zoo_scale.csv", newline="") as lines:
        [row] = csv.DictReader(lines)
    assert (row["layers"], row["heads"], row["neurons"], row["tokens"]) == ("1", "8", "112", "4")
    assert int(row["nodes"]) > 100
    assert float(row["analysis_s"]) > 0.0
