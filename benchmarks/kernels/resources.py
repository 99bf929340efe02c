"""What the Triton kernels take of each GPU, compiled without one.

Kernels are compiled as the library launches them: it is called with tensors that have no memory, and each of its
launches, with Triton's own specialization of the arguments, is compiled instead of run.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from tabulate import tabulate
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from cacompile.kernels import triton_conv, triton_matmul

KIB = 1024


class Gpu(NamedTuple):
    """One of the GPUs behind a name in CONFIGS; memory in KiB, of which CUDA keeps some for itself."""

    name: str
    target: GPUTarget
    multiprocessors: int
    shared: int
    shared_of_program: int
    kept_of_program: int
    registers: int
    """Of a multiprocessor, 32 bits wide."""


GPUS = {
    "sm_80": Gpu("A100", GPUTarget("cuda", 80, 32), 108, 164, 163, 1, 2**16),
    "sm_90": Gpu("H200", GPUTarget("cuda", 90, 32), 132, 228, 227, 1, 2**16),
    "sm_100": Gpu("B200", GPUTarget("cuda", 100, 32), 148, 228, 227, 1, 2**16),
    "amd": Gpu("MI300X", GPUTarget("hip", "gfx942", 64), 304, 64, 64, 0, 2**17),
}


class _Driver:
    """Of a GPU that is not there."""

    def __init__(self, arch: str) -> None:
        self.get_current_device = lambda: arch
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: GPUS[arch].target


class Launch(NamedTuple):
    arch: str
    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def compile(self) -> Any:
        with mock.patch.object(driver, "_active", _Driver(self.arch)):
            return self.kernel.warmup(*self.args, grid=self.grid, **self.options)


@contextmanager
def absent(arch: str, precision: str = "ieee") -> Iterator[list[Launch]]:
    """As on that GPU, with launches put into the list that this gives. precision: of float32, "ieee" or "tf32"."""
    launches: list[Launch] = []

    def record(kernel: JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **options: launches.append(Launch(arch, kernel, grid, args, options))

    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    with (
        mock.patch.object(JITFunction, "__getitem__", record),
        mock.patch.multiple(triton_matmul, **_of(triton_matmul, arch)),
        mock.patch.multiple(triton_conv, **_of(triton_conv, arch)),
    ):
        torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = precision
        try:
            yield launches
        finally:
            torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before


def _of(module: Any, arch: str) -> dict[str, Callable[..., Any]]:
    """What a module is told instead; nothing is remembered from one GPU to the next."""
    anew = {name: f.__wrapped__ for name, f in vars(module).items() if hasattr(f, "cache_info")}
    told = {"architecture": lambda device: arch, "multiprocessors": lambda device: GPUS[arch].multiprocessors}
    return {**anew, **told}


def operand(rows: int, columns: int, *, turned: bool, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> Tensor:
    """[batch, rows, columns] without memory; turned: its columns are contiguous."""
    matrices = torch.empty((batch, columns, rows) if turned else (batch, rows, columns), dtype=dtype, device="meta")
    return matrices.mT if turned else matrices


def image(shape: Sequence[int], *, channels_last: bool = True, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Images or filters without memory."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(*shape, dtype=dtype, device="meta").to(memory_format=memory_format)


class Case(NamedTuple):
    """A masked product that is compiled, and the entry of CONFIGS it is to take; `square` where there is no such."""

    entry: str
    mask: str
    blocks: tuple[int, int, int]
    dtype: torch.dtype = torch.bfloat16
    precision: str = "ieee"
    batch: int = 1
    size: int = 4096
    """Rows and columns of the product."""

    def launches(self, arch: str, *, dy_t_x: bool = True) -> list[Launch]:
        """dy_t_x: operands as of a linear layer's dW, else each turned. The last launch adds up split tiles."""
        size = self.size
        a = operand(size, 2 * size, turned=dy_t_x, dtype=self.dtype, batch=self.batch)
        b = operand(2 * size, size, turned=not dy_t_x, dtype=self.dtype, batch=self.batch)
        flags = torch.empty(3 * size, dtype=torch.uint8, device="meta")
        with absent(arch, self.precision) as launches:
            triton_matmul.masked_matmul(a, b, flags, (0, 0, 0), self.blocks)
        return launches

    def taken(self, arch: str) -> str:
        return self.entry if self.entry in triton_matmul.CONFIGS[arch] else "square"


CASES = (
    Case("wide", "rows of 128", (0, 128, 0)),
    Case("wide", "experts", (1, 0, 0), batch=8),
    Case("tall", "columns of 128", (0, 0, 128)),
    Case("square", "rows and columns of 128", (0, 128, 128)),
    Case("square", "rows of 300", (0, 300, 0)),
    Case("flat", "rows of 64", (0, 64, 0)),
    Case("slim", "columns of 64", (0, 0, 64)),
    Case("small", "rows and columns of 64", (0, 64, 64)),
    Case("small", "rows of 50", (0, 50, 0)),
    Case("unaligned", "rows of 128, odd strides", (0, 128, 0), size=4097),
    Case("tf32", "rows of 128", (0, 128, 0), torch.float32, "tf32"),
    Case("float32", "rows of 128", (0, 128, 0), torch.float32),
    Case("float32", "columns of 50", (0, 0, 50), torch.float32),
)


class Resources(NamedTuple):
    """Of one program; registers of one thread; spilled in bytes (NVIDIA) or registers (AMD)."""

    registers: int
    spilled: int
    shared: int
    threads: int
    tensor_memory: int
    code: str


def resources(compiled: Any) -> Resources:
    """Of a kernel compiled for whichever GPU."""
    metadata = compiled.metadata
    if "ptx" not in compiled.asm:
        code = compiled.asm["amdgcn"]
        registers, spilled = (int(re.search(rf"\.{name}:\s+(\d+)", code)[1]) for name in _AMD_COUNTS)
        return Resources(registers, spilled, metadata.shared, metadata.num_warps * metadata.warp_size, 0, code)
    code = compiled.asm["ptx"]
    said = assemble(code, metadata.target.arch)
    registers, spilled = (int(re.search(words, said)[1]) for words in (r"Used (\d+) reg", r"(\d+) bytes spill stores"))
    threads = int(re.search(r"\.reqntid (\d+)", code)[1])  # with those that warp specialization adds
    return Resources(registers, spilled, metadata.shared, threads, metadata.tmem_size, code)


_AMD_COUNTS = ("vgpr_count", "vgpr_spill_count")


def ptxas(capability: int) -> Any:
    """The assembler that Triton takes; .path and .version."""
    newer = (90 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9) else 100) <= capability
    blackwell = getattr(triton.knobs.nvidia, "ptxas_blackwell", None)
    return blackwell if newer and blackwell is not None else triton.knobs.nvidia.ptxas


def assemble(ptx: str, capability: int) -> str:
    """What the assembler says of registers and spills."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        target = "--gpu-name=" + re.search(r"\.target (\w+)", ptx)[1]
        command = [ptxas(capability).path, "-v", target, "kernel.ptx", "-o", "kernel.cubin"]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr


class ConvCase(NamedTuple):
    """A weight gradient of 3x3 filters that is compiled, channels last, and its entry of the convolution's CONFIGS."""

    entry: str
    mask: str
    filters: int
    channels: int
    block: int
    groups: int = 1
    dtype: torch.dtype = torch.bfloat16
    precision: str = "ieee"

    def launches(self, arch: str, *, channels_last: bool = True) -> list[Launch]:
        shapes = (
            (64, self.filters, 32, 32),
            (64, self.channels * self.groups, 32, 32),
            (self.filters, self.channels, 3, 3),
        )
        grad_out, x, out = (image(shape, channels_last=channels_last, dtype=self.dtype) for shape in shapes)
        flags = torch.empty(self.filters, dtype=torch.uint8, device="meta")
        with absent(arch, self.precision) as launches:
            triton_conv.write_conv_dw(out, grad_out, x, flags, 0, self.block, (1, 1), (1, 1), (1, 1), self.groups)
        return launches

    def taken(self, arch: str) -> str:
        return self.entry


CONV_CASES = (
    ConvCase("large", "filters of 128", 256, 256, 128),
    ConvCase("small", "filters of 64", 64, 64, 64),
    ConvCase("small", "filters of 50", 256, 256, 50),
    ConvCase("tiny", "filters of 64, depthwise", 256, 1, 64, groups=256),
    ConvCase("small", "filters of 64", 64, 64, 64, dtype=torch.float32, precision="tf32"),
    ConvCase("float32", "filters of 64", 64, 64, 64, dtype=torch.float32),
)


def tile_of(case: Case | ConvCase, arch: str) -> Any:
    return (triton_matmul if isinstance(case, Case) else triton_conv).CONFIGS[arch][case.taken(arch)]


def resource_table() -> str:
    """Of every case on every GPU, by compiling it: minutes."""
    heads = ("GPU", "kernel", "entry", "mask, operands", "tile", "warps", "stages", "a multiprocessor",
             "registers", "spilled", "shared memory, KiB")  # fmt: skip
    rows = []
    for arch, gpu in GPUS.items():
        for case in (*CASES, *CONV_CASES):
            tile, found = tile_of(case, arch), resources(case.launches(arch)[0].compile())
            kind = "TF32" if case.precision == "tf32" else str(case.dtype).removeprefix("torch.")
            shape = f"{tile.m} x {tile.n} x {tile.k(case.dtype)}"
            kernel = "product" if isinstance(case, Case) else "convolution"
            rows.append((f"{arch} ({gpu.name})", kernel, case.taken(arch), f"{case.mask}, {kind}", shape, tile.warps,
                         tile.stages, tile.per_sm, found.registers, found.spilled,
                         f"{found.shared / KIB:.0f}"))  # fmt: skip
    tools = ", ".join(f"ptxas {ptxas(c).version} for sm_{c}" for c in (90, 100))
    return f"triton {triton.__version__}; {tools}.\n\n" + tabulate(rows, heads, tablefmt="github")
