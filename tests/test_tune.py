"""tune: the table it writes is the table that is read; overhead writes its rows."""

import pytest
from scripts import read_rows, run_module

from benchmarks.kernels import tune

INF = float("inf")


@pytest.mark.parametrize(
    "ratio_at, long_run",
    (
        ({16: 1.4, 64: 1.1, 256: 0.9, 512: 0.8}, 256),
        ({16: 0.9, 64: 1.1, 256: 0.9}, 16),
        ({16: 0.9, 64: 1.3, 256: 0.9}, 256),
        ({16: 1.3, 64: 0.6, 256: 1.05}, 64),
        ({16: 0.9, 64: 0.9}, 16),
        ({16: 1.4, 64: 1.1}, INF),
        ({}, INF),
    ),
)
def test_long_run(ratio_at, long_run):
    assert tune.long_run_of(ratio_at) == long_run


@pytest.mark.parametrize(
    "ratio_at, below",
    (
        ({0.25: 0.7, 0.5: 0.9, 0.75: 1.2}, 0.625),
        ({0.25: 0.7, 0.5: 0.9}, 1.0),
        ({0.25: 1.1, 0.5: 0.95}, 0.0),
        ({0.25: 1.05, 0.5: 0.7, 0.75: 1.2}, 0.625),
        ({}, 0.0),
    ),
)
def test_tiles_below(ratio_at, below):
    assert tune.tiles_below_of(ratio_at) == below


@pytest.mark.slow
def test_tune_replaces_the_rows_of_its_own_device(tmp_path):
    file = tmp_path / "measured.csv"
    file.write_text(
        "device,capability,op,dtype,m,n,k,long_run,tiles_below\n"
        "cpu,,mm,float32,9,9,9,9,0\nSome GPU,9.0,mm,float32,9,9,9,9,0.5\n"
    )
    out = run_module("benchmarks.kernels.tune", "--self-check", "--device", "cpu", "--out", str(file))
    assert "slices / packed" in out and "medians of 2 interleaved rounds" in out
    rows = read_rows(file)
    assert rows[0]["device"] == "Some GPU" and {row["device"] for row in rows[1:]} == {"cpu"}
    assert {row["op"] for row in rows[1:]} == {"mm", "bmm", "conv"} and "9" not in {row["m"] for row in rows[1:]}
    assert all(float(row["long_run"]) > 0 and row["tiles_below"] == "0" and row["date"] for row in rows[1:])


@pytest.mark.slow
def test_overhead_writes_its_rows(tmp_path):
    file = tmp_path / "rows.csv"
    assert "goal 10 us" in run_module("benchmarks.speed.overhead", "--self-check", "--out", str(file))
    rows = read_rows(file)
    assert [row["unit"] for row in rows] == ["us"] * 12  # four cases: the library, ours, the difference
