"""Is this machine fit for the backend? Looks at versions, compilers and devices; changes nothing."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import torch

from .errors import ConvAwareError
from .torch_internals import CACHE, COMPILE, CONTRACTS, TESTED, broken_contracts, release

OPTIONAL = {
    "triton": "the masked kernels of GPUs, and Inductor's own",
    "typer": "this command line",
    "rich": "this command line, and reports in a terminal",
    "matplotlib": "pages of reports, and plots of examples and benchmarks",
    "pygraphviz": "pictures and pages of explanations",
    "pandas": "tables of examples and benchmarks",
    "tensorboard": "curves of runs",
    "lightning": "training by Lightning",
    "accelerate": "training by Accelerate",
    "transformers": "training by transformers' Trainer",
}
"""Distribution -> what it is for; nothing here is needed to train."""


class Check(NamedTuple):
    """One line of what was found."""

    name: str
    state: str
    """ok; note: something is not used, or not as fast; fails: the backend cannot work."""
    says: str


def examine() -> list[Check]:
    """Everything that can be seen without compiling."""
    checks = [Check("python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")]
    checks += [*_torch(), *_backend(), *_libraries()]
    checks += [_compiler(), *_devices(), *_kernels(), *_surroundings()]
    return checks


def _number(release: str) -> tuple[int, ...]:
    return tuple(map(int, release.split(".")))


def report(test: bool) -> int:
    """Write what was found to standard output, with no library beyond torch; the exit status, 1 if anything fails."""
    checks = [*examine(), *([self_test()] if test else [])]
    width = max(len(check.name) for check in checks)
    sys.stdout.writelines(f"{check.state:<5}  {check.name:<{width}}  {check.says}\n" for check in checks)
    return int(any(check.state == "fails" for check in checks))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch() -> Iterator[Check]:
    here, tested = release(), ", ".join(TESTED)
    if _number(here) < _number(TESTED[0]):
        yield Check("torch", "fails", f"{torch.__version__}; needed: {TESTED[0]} or newer")
    elif here not in TESTED:
        yield Check("torch", "note", f"{torch.__version__} was never tried; tested: {tested}")
    else:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
        yield Check("torch", "ok", f"{torch.__version__}, {built}")
    broken = broken_contracts()
    if not broken:
        yield Check("torch's inside", "ok", f"all {len(CONTRACTS)} names that are needed of it are there, and fit")
    for each in broken:
        purpose = each.contract.purpose
        seen = f"{each}; needed for {purpose}, seen to hold on {', '.join(each.contract.seen)}"
        yield Check("torch's inside", "fails" if purpose == COMPILE else "note", seen)


def _backend() -> Iterator[Check]:
    try:
        from .backend import convaware  # noqa: F401
    except Exception as error:
        yield Check("cacompile", "fails", f"does not import: {type(error).__name__}: {error}")
        return
    from cacompile import __version__

    if "convaware" in torch.compiler.list_backends(exclude_tags=None):
        yield Check("cacompile", "ok", f'{__version__}, backend="convaware" is registered')
    else:
        says = f'{__version__} is not installed, so torch does not know backend="convaware": pip install .'
        yield Check("cacompile", "fails", says)


def _libraries() -> Iterator[Check]:
    for name in ("numpy", "networkx", "tabulate", "jinja2"):
        version = _version(name)
        yield Check(name, "ok" if version else "fails", version or f"missing: pip install {name}")
    for name, purpose in OPTIONAL.items():
        version = _version(name)
        yield Check(name, "ok", version) if version else Check(name, "note", f"not installed; for {purpose}")


def _compiler() -> Check:
    """Inductor compiles C++ for CPUs, and for GPUs what launches its kernels."""
    from cacompile.torch_internals import get_cpp_compiler

    try:
        name = get_cpp_compiler()
        found = subprocess.run([name, "--version"], capture_output=True, text=True, check=True, timeout=60)
    except Exception as error:
        says = (
            f"Inductor finds none: {_first_line(error)}; install g++, or compile with options={{'inner': 'aot_eager'}}"
        )
        return Check("C++ compiler", "fails", says)
    return Check("C++ compiler", "ok", f"{name}: {found.stdout.splitlines()[0]}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _devices() -> Iterator[Check]:
    from torch.backends.cpu import get_cpu_capability

    threads = torch.get_num_threads()
    yield Check("CPU", "ok", f"{get_cpu_capability()}, {threads} thread{'s' if threads != 1 else ''}")
    if not torch.cuda.is_available():
        why = "torch is built for CPUs" if torch.version.cuda is None else "torch sees no device"
        yield Check("GPU", "note", f"none: {why}")
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = found.total_memory / 2**30
        yield Check(f"GPU {index}", "ok", f"{found.name}, sm_{found.major}{found.minor}, {memory:.0f} GiB")


def _kernels() -> Iterator[Check]:
    from cacompile.kernels.dispatch import describe, table

    yield Check("dW on CPUs", "ok", "the library's products, on the slices that are on")
    if not torch.cuda.is_available():
        yield Check("dW on GPUs", "note", "not used: no GPU")
        yield Check("CUDA graphs", "note", "not used: no GPU")
        return
    from .torch_internals import has_triton

    usable = has_triton()
    name, capability = describe(torch.device("cuda", 0))
    measured = any(row.device == name for row in table())
    family = any(row.capability.split(".")[0] == capability.split(".")[0] for row in table())
    if not usable:
        why = "triton is not installed" if _version("triton") is None else "triton does not support this device"
        yield Check("dW on GPUs", "fails", f"Inductor cannot compile for it: {why}")
        yield Check("CUDA graphs", "note", f"not used: {why}")
        return
    rows = "measured on this device" if measured else "measured on its family" if family else "never measured"
    says = f"the library where the host may look, else Triton kernels; shapes {rows}"
    hint = "" if measured else ": python -m benchmarks.kernels.tune does that in minutes"
    yield Check("dW on GPUs", "ok" if measured else "note", says + hint)
    yield Check("CUDA graphs", "ok", 'mode="reduce-overhead": Triton kernels read the mask on the device')


def _surroundings() -> Iterator[Check]:
    """Settings under which less happens than one thinks."""
    from .torch_internals import caches_are_on, dynamo_config, inductor_config

    if dynamo_config.disable:
        says = "off, as by TORCH_COMPILE_DISABLE=1: models run eagerly, and nothing is skipped"
        yield Check("torch.compile", "fails", says)
    if dynamo_config.compiled_autograd:
        yield Check("compiled autograd", "note", "on: models train dense, nothing is skipped")
    if inductor_config.force_disable_caches:
        yield Check("Inductor's cache", "note", "off: each start compiles everything again")
    elif not caches_are_on():
        why = "see torch's inside" if broken_contracts(CACHE) else "switched off in torch's configuration"
        yield Check("AOTAutograd's cache", "note", f"not used for our graphs, each start traces them again: {why}")


def self_test() -> Check:
    """Compile a small model with the default options, train it with a mask, and hold its gradients against eager's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return Check("self test", "ok", f"{_train(device)} on {device}")
    except Exception as error:
        return Check("self test", "fails", f"on {device}: {type(error).__name__}: {_first_line(error)}")


def _train(device: torch.device) -> str:
    from cacompile import session, status

    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.Linear(512, 64)).to(device)
    run = torch.compile(model, backend="convaware")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    x = torch.randn(256, 64, device=device)
    for keep in (1.0, 1.0, 0.5, 0.5):
        expected = torch.autograd.grad(_loss(model(x), x), list(model.parameters()))
        session(model).pin(keep=keep)
        _loss(run(x), x).backward()
        for (name, param), right in zip(model.named_parameters(), expected):
            assert param.grad is not None
            # what is off is zero, all else is right
            wrong = ~torch.isclose(param.grad, right, rtol=1e-2, atol=1e-4 * float(right.abs().max()))
            if bool((wrong & (param.grad != 0.0)).any()):
                raise ConvAwareError(f"the gradient of {name} is wrong with keep={keep}")
        optimizer.step()
        optimizer.zero_grad()
    found = status(model)
    if not 0 < found.saved_flops < found.dw_flops:
        raise ConvAwareError(f"{found.saved_flops} of {found.dw_flops} dW FLOPs were skipped")
    return f"4 steps, gradients as eager's, {found.saved_flops / found.dw_flops:.0%} of dW FLOPs skipped"


def _loss(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return (y - x.sin()).square().mean()
