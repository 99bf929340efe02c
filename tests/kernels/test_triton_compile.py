"""The Triton kernels, compiled for GPUs that need not be there: tensor cores, wide loads, registers, shared memory."""

import re
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", exc_type=ImportError)

from benchmarks.kernels.resources import (
    CASES,
    CONV_CASES,
    GPUS,
    KIB,
    Case,
    Launch,
    Resources,
    absent,
    operand,
    resources,
    tile_of,
)
from cacompile.kernels import triton_conv, triton_grouped, triton_matmul

TENSOR_CORES = {"sm_80": r"mma\.sync", "sm_90": r"wgmma\.mma_async", "sm_100": r"tcgen05\.mma", "amd": r"v_mfma"}
TENSOR_MEMORY = 512  # columns of a multiprocessor, sm_100
COPIED = r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)"  # bytes at a time
BOXES = r"cp\.async\.bulk\.tensor"
WIDE = r"ld\.global\S*\.v4\.b32|(?:buffer|global)_load_dwordx4"


def case_id(case: Any) -> str:
    return f"{case.entry}-{case.mask}-{case.precision if case.dtype == torch.float32 else 'bf16'}"


@pytest.fixture(params=GPUS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


def compile_checked(launch: Launch, per_sm: int = 1) -> Resources:
    """Compiled; spills nothing, and so many programs fit on a multiprocessor."""
    gpu, found = GPUS[launch.arch], resources(launch.compile())
    assert found.spilled == 0, f"spills with {found.registers} registers a thread"
    shared = found.shared / KIB
    assert shared <= gpu.shared_of_program
    assert (shared + gpu.kept_of_program) * per_sm <= gpu.shared
    assert found.registers * found.threads * per_sm <= gpu.registers
    assert found.tensor_memory * per_sm <= TENSOR_MEMORY
    return found


def check_speed(launch: Launch, found: Resources, case: Any) -> None:
    """Tensor cores wherever operands allow them, and operands read 16 bytes at a time, or as boxes."""
    code, options = found.code, launch.options
    exact = case.dtype == torch.float32 and case.precision == "ieee"
    if not exact:
        assert re.search(TENSOR_CORES[launch.arch], code)
    elif launch.arch != "amd":  # which multiplies exact float32 on its tensor cores as well
        assert not re.search("|".join(TENSOR_CORES.values()), code)
    boxes = options.get("TMA", False)
    assert bool(re.search(BOXES, code)) == boxes
    assert bool(re.search("setmaxnreg", code)) == (boxes and options["WARP_SPECIALIZE"])
    if not boxes:
        assert set(re.findall(COPIED, code)) <= {"0x10"}
        assert re.search(COPIED, code) or re.search(WIDE, code)


@pytest.mark.thin(8)
@pytest.mark.parametrize("dy_t_x", (True, False), ids=("dy_t_x", "turned"))
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_products(arch, case, dy_t_x):
    tile, (launch, add_parts) = tile_of(case, arch), case.launches(arch, dy_t_x=dy_t_x)
    assert tile.meta(case.dtype).items() <= launch.options.items(), "another entry was chosen"
    sixteen_bits = case.dtype != torch.float32
    aligned = case.entry != "unaligned"  # rows of odd length are no boxes, nor can they be read 16 bytes at a time
    has_boxes = arch in ("sm_90", "sm_100") and aligned and (sixteen_bits or case.precision == "tf32")
    assert launch.options["TMA"] == has_boxes
    assert launch.options["WARP_SPECIALIZE"] == (arch == "sm_100" and sixteen_bits)
    found = compile_checked(launch, tile.per_sm)
    if aligned:
        check_speed(launch, found, case)
    else:
        assert re.search(TENSOR_CORES[arch], found.code)
    if dy_t_x:  # of which the layouts of operands are no part
        assert re.search(WIDE, compile_checked(add_parts).code)


VARIANTS = {
    "fp16": (CASES[0]._replace(dtype=torch.float16), {}),
    "nothing masked": (CASES[0]._replace(blocks=(0, 0, 0)), {}),
    "small tf32": (Case("small", "rows of 64", (0, 64, 0), torch.float32, "tf32"), {}),
}


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_products(arch, name):
    case, how = VARIANTS[name]
    launch, add_parts = case.launches(arch, **how)
    found = compile_checked(launch, tile_of(case, arch).per_sm)
    compile_checked(add_parts)
    check_speed(launch, found, case)


@pytest.mark.thin(4)
@pytest.mark.parametrize("case", CONV_CASES, ids=case_id)
def test_convolutions(arch, case):
    tile, (launch, add_parts) = tile_of(case, arch), case.launches(arch)
    assert tile.meta(case.dtype).items() <= launch.options.items(), "another entry was chosen"
    found = compile_checked(launch, tile.per_sm)
    if case.entry != "tiny" and case.precision != "tf32":  # which has to be turned on its way into shared memory
        check_speed(launch, found, case)
    compile_checked(add_parts)


@pytest.mark.thin(4)
@pytest.mark.parametrize("case", CONV_CASES[:2], ids=case_id)
def test_convolutions_of_contiguous_images(arch, case):
    launch, _ = case.launches(arch, channels_last=False)
    assert re.search(TENSOR_CORES[arch], compile_checked(launch, tile_of(case, arch).per_sm).code)


class Experts(NamedTuple):
    """Weight gradients of experts that are compiled, and the entry of CONFIGS they are to take."""

    entry: str
    mask: str
    blocks: tuple[int, int, int]
    dtype: torch.dtype = torch.bfloat16
    precision: str = "ieee"
    size: int = 4096
    tokens_in_rows: bool = True
    """As they are in a linear layer's weight gradient; in columns, an expert's first one lies anywhere."""

    def launch(self, arch: str) -> Launch:
        size, tokens = self.size, 2 * self.size
        a = operand(size, tokens, turned=self.tokens_in_rows, dtype=self.dtype)[0]
        b = operand(tokens, size, turned=not self.tokens_in_rows, dtype=self.dtype)[0]
        offs, flags = (torch.empty(3 * size, dtype=dtype, device="meta") for dtype in (torch.int32, torch.uint8))
        there = {"architecture": lambda device: arch, "_plan": triton_grouped._plan.__wrapped__}
        with absent(arch, self.precision) as launches, mock.patch.multiple(triton_grouped, **there):
            triton_grouped.masked_grouped_matmul(a, b, offs[:8], flags, (0, 0, 0), self.blocks)
        return launches[0]


EXPERTS = (
    Experts("large", "experts", (1, 0, 0)),
    Experts("large", "all of 128", (1, 128, 128), torch.float16),
    Experts("large", "rows of 300", (0, 300, 0)),
    Experts("small", "columns of 50", (1, 0, 50)),
    Experts("small", "rows and columns of 64", (0, 64, 64)),
    Experts("unaligned", "odd strides", (1, 50, 50), size=4097),
    Experts("unaligned", "tokens in columns", (1, 50, 50), tokens_in_rows=False),
    Experts("tf32", "experts", (1, 0, 0), torch.float32, "tf32"),
    Experts("tf32", "rows of 300", (1, 300, 0), torch.float32, "tf32"),
    Experts("small", "rows of 50", (1, 50, 0), torch.float32, "tf32"),
    Experts("unaligned", "tokens in columns", (1, 50, 0), torch.float32, "tf32", tokens_in_rows=False),
    Experts("float32", "experts", (1, 0, 0), torch.float32),
    Experts("float32", "tokens in columns", (1, 50, 50), torch.float32, tokens_in_rows=False),
)


@pytest.mark.thin(4)
@pytest.mark.parametrize("case", EXPERTS, ids=case_id)
def test_experts(arch, case):
    tile, launch = triton_grouped.CONFIGS[arch][case.entry], case.launch(arch)
    assert tile.meta(case.dtype).items() <= launch.options.items(), "another entry was chosen"
    found = compile_checked(launch, tile.per_sm)
    if case.entry != "unaligned" and case.precision != "tf32" and case.tokens_in_rows:  # as of convolutions
        check_speed(launch, found, case)
    elif case.entry != "float32":
        assert re.search(TENSOR_CORES[arch], found.code)


def test_every_entry_is_compiled(arch):
    for cases, module in ((CASES, triton_matmul), (CONV_CASES, triton_conv)):
        assert {case.taken(arch) for case in cases} == set(module.CONFIGS[arch])
    assert {case.entry for case in EXPERTS} == set(triton_grouped.CONFIGS[arch])
