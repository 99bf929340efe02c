"""docs/kernels.md says what the code does: its arithmetic is the command's, and no entry of CONFIGS is missing."""

import pytest

pytest.importorskip("triton", exc_type=ImportError)

from benchmarks.kernels.docs import PAGE, read_section
from benchmarks.kernels.resources import GPUS
from benchmarks.kernels.rooflines import roofline_table
from cacompile.kernels import triton_conv, triton_matmul

ANEW = "python -m benchmarks.kernels.docs"


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_rooflines_are_those_of_the_command():
    assert read_section(PAGE.read_text(), "rooflines") == roofline_table(), f"write it anew: {ANEW} --rooflines"


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("kernel, module", (("product", triton_matmul), ("convolution", triton_conv)))
def test_every_entry_has_rows_with_its_tile(arch, kernel, module):
    table = rows_of(read_section(PAGE.read_text(), "resources"))
    found = {}
    for gpu, name, entry, _, tile, warps, stages, per_sm, *_ in table[2:]:
        if (gpu.split()[0], name) == (arch, kernel):
            rows, columns, _ = tile.split(" x ")
            found[entry] = tuple(map(int, (rows, columns, warps, stages, per_sm)))
    entries = module.CONFIGS[arch].items()
    assert found == {name: (t.m, t.n, t.warps, t.stages, t.per_sm) for name, t in entries}, f"write it anew: {ANEW}"


def test_nothing_spills_in_the_table():
    heads, _, *rows = rows_of(read_section(PAGE.read_text(), "resources"))
    assert {row[heads.index("spilled")] for row in rows} == {"0"}
