"""What we need of torch's inside, name by name, and that nothing else of ours reaches in there."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cacompile import torch_internals, torch_internals_cache
from cacompile.torch_internals import CONTRACTS, Contract, broken_contracts

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "torch._grouped_mm": "the operation itself, in the reference of ours",
    "torch.ops.": "operations by their name, which is public",
    "torch._dynamo.reset": "named in docstrings and called by tests",
}
"""Private names that stand elsewhere, each with its reason."""


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_contract(contract: Contract) -> None:
    assert contract.fault() is None
    assert getattr(torch_internals, contract.name) is contract.resolve()
    purposes = [getattr(torch_internals, name) for name in ("COMPILE", "LOOK", "RANKS", "CACHE", "SEE")]
    assert contract.seen and contract.purpose in purposes


@pytest.mark.parametrize(
    ("contract", "words"),
    [
        (Contract("x", "torch._nowhere"), "torch._nowhere"),
        (Contract("x", "torch._guards:Moved"), "Moved"),
        (Contract("x", "torch._functorch.config", ("joint_custom_pass", "moved.too")), "has no 'moved.too'"),
        (Contract("x", "torch._logging:trace_structured", parameters=("payload_fn", "moved")), "takes no 'moved'"),
    ],
)
def test_what_does_not_hold_is_said(contract: Contract, words: str) -> None:
    assert words in (contract.fault() or "")


def test_a_contract_can_be_taken_away_for_a_test() -> None:
    assert broken_contracts() == []
    with torch_internals.taken_away("counters"):
        (broken,) = broken_contracts()
        assert str(broken) == "counters (torch._dynamo.utils:counters): was taken away for a test"
        assert broken_contracts(torch_internals.LOOK) == []
    assert broken_contracts() == []
    with pytest.raises(KeyError), torch_internals.taken_away("no such contract"):
        pass
    with pytest.raises(AttributeError, match="no_such_name"):
        torch_internals.no_such_name  # noqa: B018


def test_what_type_checkers_see_is_what_there_is() -> None:
    tree = ast.parse(Path(torch_internals.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname or alias.name: f"{statement.module}.{alias.name}"
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert seen == {contract.name: contract.place.replace(":", ".") for contract in CONTRACTS}


def private_names(path: Path) -> Iterator[str]:
    """Names of torch's with a part that begins with an underscore, or that torch says will move."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute):
            parts: list[str] = []
            while isinstance(node, ast.Attribute):
                parts, node = [node.attr, *parts], node.value
            if isinstance(node, ast.Name):
                yield ".".join([node.id, *parts])


def sources() -> list[Path]:
    found = [*(ROOT / "cacompile").rglob("*.py"), *(ROOT / "passes").rglob("*.py")]
    internals = {Path(module.__file__ or "").resolve() for module in (torch_internals, torch_internals_cache)}
    return sorted({path.resolve() for path in found} - internals)


def test_nobody_else_touches_private_parts_of_torch() -> None:
    touched = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sources()
        for name in private_names(path)
        if name.startswith("torch.")
        and any(part.startswith("_") and not part.startswith("__") for part in name.split("."))
        if not any(name.startswith(allowed) for allowed in ALLOWED)
    }
    assert not touched
    assert len(sources()) > 50


def test_the_release_that_is_there_is_told() -> None:
    assert torch.__version__.startswith(torch_internals.release())


def test_a_name_that_has_moved_is_found_in_either_place() -> None:
    assert Contract("x", "torch.nowhere:Tensor | torch:Tensor").resolve() is torch.Tensor
    assert Contract("x", "torch:nothing | torch:Tensor").fault() is None
    assert "nowhere" in str(Contract("x", "torch:nothing | torch.nowhere").fault())
