"""The embedding gradient's Triton kernel: by the interpreter, and compiled for GPUs."""

import re

import pytest
import torch
from masking import SLOT

triton = pytest.importorskip("triton", exc_type=ImportError)


def case(dtype: torch.dtype, shape: tuple[int, ...], rows: int, d: int, block: int, padding_idx: int) -> None:
    from cacompile.kernels import masked_embedding_dw_reference
    from cacompile.kernels.triton_embedding import scatter_rows

    torch.manual_seed(0)
    grad_out, indices = torch.randn(*shape, d).to(dtype), torch.randint(0, rows, shape)
    flags = (torch.rand(SLOT + -(-rows // block)) < 0.5).to(torch.uint8)
    grad_out[flags[SLOT:][indices // block] == 0] = float("nan")  # not to be read
    out = scatter_rows(grad_out, indices, flags, SLOT, block, rows, padding_idx)
    exact = masked_embedding_dw_reference(grad_out.double(), indices, flags, None, SLOT, block, rows, padding_idx)
    torch.testing.assert_close(out, exact.to(dtype), rtol=2e-3, atol=2e-3)
    with pytest.raises(IndexError, match="flags for"):
        scatter_rows(grad_out, indices, flags[1:], SLOT, block, rows, padding_idx)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize(
    "shape, rows, d, block, padding_idx", (((7,), 1, 1, 8, -1), ((3, 21), 40, 300, 4, 5), ((0,), 10, 4, 3, -1))
)
def test_interpreted(interpreter, dtype, shape, rows, d, block, padding_idx):
    interpreter(case, dtype, shape, rows, d, block, padding_idx)


@pytest.mark.parametrize("target", (("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)))
def test_compiled_it_reads_wide_and_does_not_spill(target):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from cacompile.kernels.triton_embedding import COLUMNS, TOKENS, scatter_rows_kernel

    constants = {"BLOCK": 128, "TOKENS": TOKENS, "COLUMNS": COLUMNS, "stride_d": 1}
    types = {"out": "*fp32", "grad_out": "*bf16", "indices": "*i64", "flags": "*u8"}
    names = scatter_rows_kernel.arg_names
    source = ASTSource(
        fn=scatter_rows_kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in ("out", "grad_out", "D", "stride_t")},
    )
    compiled = triton.compile(source, target=GPUTarget(*target), options={"num_warps": 4})
    if target[0] == "hip":
        assert re.search(r"\.vgpr_spill_count:\s+0\b", compiled.asm["amdgcn"])
        assert "_load_dwordx4" in compiled.asm["amdgcn"]
    else:
        assert re.search(r"ld\.global\S*\.v4\.b32", compiled.asm["ptx"]) and ".local" not in compiled.asm["ptx"]
