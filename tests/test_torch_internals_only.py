"""Nothing but `cacompile.torch_internals` reaches into torch: no name, attribute or string that is private."""

from __future__ import annotations

import ast
import importlib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cacompile import torch_internals
from cacompile.torch_internals import inductor_prims

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "_name_": "of enum, documented",
    "_value_": "of enum, documented",
    "_missing_": "of enum, documented",
    "_replace": "of named tuples, documented",
    "_getframe": "of sys, documented",
    "_logger_connector": "of Lightning, in its integration",
}
"""Private attributes of others than torch, each with its reason."""

OPERATIONS = (torch.ops.aten, torch.ops.prims, torch.ops.inductor, torch.ops.higher_order, inductor_prims)
"""Where operations have their names, which are public whatever they begin with."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier() and name.strip("_") != ""


def defined(tree: ast.AST) -> set[str]:
    """What a file calls something itself: functions, classes, variables, fields, attributes of `self`, slots."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            found.add(node.attr)
    return found


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_parts(tree: ast.AST, inherited: set[str]) -> Iterator[str]:
    """What a file takes of others that has a private name, or that its module does not say is public.

    inherited: attributes that classes of ours may have from other files.
    """
    ours = defined(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            holder = ast.unparse(node.value)
            if holder.split(".")[0] == "aten" or holder.startswith("torch.ops."):
                continue
            if node.attr not in (ours | inherited if _is_self(node.value) else ours) and node.attr not in ALLOWED:
                yield ast.unparse(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and is_private(node.value):
            if node.value not in ours and not any(hasattr(space, node.value) for space in OPERATIONS):
                yield repr(node.value)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("torch._"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from _hidden(node)


def _hidden(statement: ast.ImportFrom) -> Iterator[str]:
    module = importlib.import_module(statement.module or "")
    public = getattr(module, "__all__", None)
    for alias in statement.names:
        name = f"{statement.module}.{alias.name}"
        said = public is None or alias.name in public or isinstance(getattr(module, alias.name), types.ModuleType)
        if any(map(is_private, name.split("."))) or not said:
            yield name


def sources() -> list[Path]:
    found = {path.resolve() for folder in ("cacompile", "passes") for path in (ROOT / folder).rglob("*.py")}
    inside = Path(torch_internals.__file__).resolve().parent
    return sorted(path for path in found if inside not in path.parents)


def test_nobody_else_touches_private_parts_of_torch() -> None:
    trees = {path: ast.parse(path.read_text()) for path in sources()}
    inherited = set().union(*map(defined, trees.values()))
    touched = [f"{path.relative_to(ROOT)}: {name}" for path in trees for name in private_parts(trees[path], inherited)]
    assert not touched
    assert len(trees) > 50


@pytest.mark.parametrize(
    "line",
    [
        "torch._dynamo.reset()",
        "from torch._guards import TracingContext",
        "from torch._dynamo.eval_frame import OptimizedModule",
        "from torch.utils.flop_counter import flop_registry",
        "import torch._inductor.config",
        "node._rename('x')",
        "tensor.untyped_storage()._cdata",
        "getattr(model, '_orig_mod', model)",
        "node.target._opname",
        "run._boxed_call = True",
        "self._graph",
    ],
)
def test_what_is_private_is_found(line: str) -> None:
    assert list(private_parts(ast.parse(line), set()))


@pytest.mark.parametrize(
    "line",
    [
        "from torch import fx",
        "from torch.optim import Optimizer",
        "aten._to_copy.default",
        "torch.ops.aten._grouped_mm.default",
        "opname(node) in ('_unsafe_view', '_cudnn_rnn_backward')",
        "self._inherited",
        "self._own = 1\nother._own",
        "model.__dict__",
        "member._value_",
    ],
)
def test_what_is_public_or_ours_is_not(line: str) -> None:
    assert not list(private_parts(ast.parse(line), {"_inherited"}))
