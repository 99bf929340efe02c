"""The Triton kernels, compiled for GPUs that need not be there: PTX, machine code, tensor cores, registers."""

import re
import subprocess
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", exc_type=ImportError)
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from cacompile.kernels.triton_conv import TILE, masked_conv_dw_kernel  # noqa: E402
from cacompile.kernels.triton_matmul import CONFIGS, masked_matmul_kernel  # noqa: E402

POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}
TENSOR_CORES = {80: r"mma\.sync", 90: r"wgmma\.mma_async|mma\.sync"}
MATMUL_UNITS = {"stride_am": 1, "stride_bn": 1}  # dy.t() and x, both contiguous in memory
CONV_UNITS = dict.fromkeys(("out_w", "grad_w", "x_w", "stride_h", "stride_w", "dilation_h", "dilation_w"), 1)

SMALL, LARGE = CONFIGS[-1][1], CONFIGS[0][1]
NEAR, FAR = triton.language.int32, triton.language.int64

KERNELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "matmul batch": (masked_matmul_kernel, SMALL, {"AXIS": 0, "INDEX": NEAR, **MATMUL_UNITS}),
    "matmul rows": (masked_matmul_kernel, SMALL, {"AXIS": 1, "INDEX": NEAR, **MATMUL_UNITS}),
    "matmul rows, large": (masked_matmul_kernel, LARGE, {"AXIS": 1, "INDEX": NEAR, **MATMUL_UNITS}),
    "matmul rows, far": (masked_matmul_kernel, SMALL, {"AXIS": 1, "INDEX": FAR, **MATMUL_UNITS}),
    "matmul columns": (masked_matmul_kernel, SMALL, {"AXIS": 2, "INDEX": NEAR, **MATMUL_UNITS}),
    "conv": (masked_conv_dw_kernel, TILE, CONV_UNITS),
}


def compile_for(capability: int, name: str, dtype: torch.dtype, input_precision: str) -> Any:
    """As a launch would compile it for sizes and strides that are multiples of 16."""
    kernel, tile, constants = KERNELS[name]
    meta = tile.meta(dtype)
    options = {"num_warps": meta.pop("num_warps")}
    constants = {**constants, **meta, "INPUT_PRECISION": input_precision}
    types = {"flags": "*u8"} | dict.fromkeys(("a", "b", "out", "grad_out", "x"), POINTERS[dtype])
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in kernel.arg_names}
    aligned = [
        (i,)
        for i, arg in enumerate(kernel.arg_names)
        if signature[arg] not in ("constexpr", "*u8") and "KERNEL" not in arg
    ]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(arg),): value for arg, value in constants.items()},
        attrs={index: [["tt.divisibility", 16]] for index in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("capability", TENSOR_CORES)
@pytest.mark.parametrize(
    "dtype, input_precision",
    ((torch.bfloat16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32")),
    ids=("bf16", "fp32", "tf32"),
)
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_to_tensor_cores_without_spilling(name, dtype, input_precision, capability, tmp_path):
    compiled = compile_for(capability, name, dtype, input_precision)
    ptx = compiled.asm["ptx"]
    assert compiled.asm["cubin"].startswith(b"\x7fELF")
    exact = dtype == torch.float32 and input_precision == "ieee"
    assert bool(re.search(TENSOR_CORES[capability], ptx)) == (not exact)
    assert compiled.metadata.shared <= 99 * 1024  # what a program may have on every GPU since sm_80
    assert spilled_bytes(ptx, tmp_path) == 0


def spilled_bytes(ptx: str, folder: Any) -> int:
    """By the assembler that triton ships."""
    (folder / "kernel.ptx").write_text(ptx)
    target = re.search(r"\.target (\w+)", ptx)
    assert target
    command = [triton.knobs.nvidia.ptxas.path, "-v", f"--gpu-name={target[1]}", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr
    stores = re.search(r"(\d+) bytes spill stores", said)
    assert stores, said
    return int(stores[1])
