"""What we need of torch's inside, name by name."""

from __future__ import annotations

import pytest
import torch

from cacompile import torch_internals
from cacompile.torch_internals import CONTRACTS, Contract, broken_contracts

PURPOSES = {
    getattr(torch_internals, name)
    for name in ("COMPILE", "LOOK", "RANKS", "SHARDS", "SCATTERS", "CACHE", "TRACED", "STANDALONE", "SEE")
}


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_contract(contract: Contract) -> None:
    assert contract.fault() is None
    assert getattr(torch_internals, contract.name) is contract.resolve()
    assert contract.seen and contract.purpose in PURPOSES


@pytest.mark.parametrize(
    ("contract", "words"),
    [
        (Contract("x", "torch._nowhere"), "torch._nowhere"),
        (Contract("x", "torch._guards:Moved"), "Moved"),
        (Contract("x", "torch._functorch.config", ("joint_custom_pass", "moved.too")), "has no 'moved.too'"),
        (Contract("x", "torch._logging:trace_structured", parameters=("payload_fn", "moved")), "takes no 'moved'"),
        (Contract("x", "torch.nn:Module", ("_parameters", "_moved")), "has no '_moved'"),
        (Contract("x", "torch.fx:Graph", probe=lambda graph: graph()._moved), "is not as it was: AttributeError"),
        (Contract("x", "torch:ops.aten.mm.default", ("_opname", "_moved")), "has no '_moved'"),
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


def test_the_release_that_is_there_is_told() -> None:
    assert torch.__version__.startswith(torch_internals.release())


def test_a_name_that_has_moved_is_found_in_either_place() -> None:
    assert Contract("x", "torch.nowhere:Tensor | torch:Tensor").resolve() is torch.Tensor
    assert Contract("x", "torch:nothing | torch:Tensor").fault() is None
    assert "nowhere" in str(Contract("x", "torch:nothing | torch.nowhere").fault())
