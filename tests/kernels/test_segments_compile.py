"""The kernels of the segment table, compiled for GPUs that need not be there: no spills, 16 bytes at a time."""

import re
import subprocess
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", exc_type=ImportError)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks.kernels.resources import ptxas  # noqa: E402
from cacompile.kernels.segments import CHUNK, FIELDS  # noqa: E402
from cacompile.kernels.triton_segments import (  # noqa: E402
    FILL_WARPS,
    PARTIALS,
    SUM_WARPS,
    TYPES,
    VECTOR,
    block_sums_kernel,
    chunk_sums_kernel,
    fill_kernel,
)

FP32, BF16, FP16 = (TYPES[dtype] for dtype in (torch.float32, torch.bfloat16, torch.float16))
SIZES = {"CHUNK": CHUNK, "VECTOR": VECTOR, "FIELDS": FIELDS}
SIGNATURE = {
    "chunks": "*i64",
    "pointers": "*i64",
    "first": "*i64",
} | dict.fromkeys(("factors", "weights", "partials", "sums"), "*fp32")

KERNELS: dict[str, tuple[Any, int, dict[str, Any], int, int]] = {  # ..., 16-byte loads and stores of a thread
    "adam fp32": (chunk_sums_kernel, SUM_WARPS, {"ADAM": True, "X": FP32, "Y": FP32, **SIZES}, 8, 0),
    "adam bf16": (chunk_sums_kernel, SUM_WARPS, {"ADAM": True, "X": BF16, "Y": BF16, **SIZES}, 4, 0),
    "square fp32": (chunk_sums_kernel, SUM_WARPS, {"ADAM": False, "X": FP32, "Y": FP32, **SIZES}, 4, 0),
    "square fp16": (chunk_sums_kernel, SUM_WARPS, {"ADAM": False, "X": FP16, "Y": FP16, **SIZES}, 2, 0),
    "fill fp32": (fill_kernel, FILL_WARPS, {"GRAD": FP32, "X": FP32, "Y": FP32, **SIZES}, 6, 2),
    "fill bf16": (fill_kernel, FILL_WARPS, {"GRAD": BF16, "X": BF16, "Y": BF16, **SIZES}, 3, 1),
    "fill bf16 from fp32": (fill_kernel, FILL_WARPS, {"GRAD": BF16, "X": FP32, "Y": BF16, **SIZES}, 4, 1),
    "blocks": (block_sums_kernel, SUM_WARPS, {"PARTIALS": PARTIALS}, 0, 0),
}


def compile_for(target: GPUTarget, name: str) -> Any:
    kernel, warps, constants, *_ = KERNELS[name]
    source = ASTSource(
        fn=kernel,
        signature={arg: "constexpr" if arg in constants else SIGNATURE[arg] for arg in kernel.arg_names},
        constexprs={(kernel.arg_names.index(arg),): value for arg, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, arg in enumerate(kernel.arg_names) if arg not in constants},
    )
    return triton.compile(source, target=target, options={"num_warps": warps})


@pytest.mark.thin(3)
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_nvidia_to_wide_accesses_without_spilling(name, capability, tmp_path):
    compiled = compile_for(GPUTarget("cuda", capability, 32), name)
    ptx = compiled.asm["ptx"]
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    wide = r"\.global\S*\.(v4\.\w?32|v2\.\w?64)\b"
    assert len(re.findall("ld" + wide, ptx)) == KERNELS[name][3]
    assert len(re.findall("st" + wide, ptx)) == KERNELS[name][4]
    assert compiled.metadata.shared <= 48 * 1024
    assert spilled_bytes(ptx, capability, tmp_path) == 0


@pytest.mark.thin(3)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_amd(name):
    compiled = compile_for(GPUTarget("hip", "gfx942", 64), name)
    assembly = compiled.asm["amdgcn"]
    loads = KERNELS[name][3]
    assert bool(re.search(r"(global|buffer)_load_dwordx[24]", assembly)) == (loads > 0)
    assert re.findall(r"\.vgpr_spill_count:\s*(\d+)", assembly) == ["0"]


def spilled_bytes(ptx: str, capability: int, folder: Any) -> int:
    """By the assembler that triton ships."""
    (folder / "kernel.ptx").write_text(ptx)
    target = re.search(r"\.target (\w+)", ptx)
    assert target
    assembler = ptxas(capability)
    command = [assembler.path, "-v", f"--gpu-name={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr
    stores = re.search(r"(\d+) bytes spill stores", said)
    assert stores, said
    return int(stores[1])
