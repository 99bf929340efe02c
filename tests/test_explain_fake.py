"""explain of models without values: on meta or made under a FakeTensorMode, as large as they may be."""

import contextlib
import resource

import pytest
import torch
from helpers import Block
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

import cacompile

OPTIONS = {"block_rows": 16}


class Net(nn.Module):
    """Between its graphs it makes tensors; it has a buffer, and a tensor that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.norm = nn.BatchNorm1d(8)
        self.block = Block(32)
        self.table = torch.ones(32)

    def forward(self, tokens):
        x = self.norm(self.embed(tokens)) * self.table
        torch._dynamo.graph_break()
        x = x + torch.ones(32, device=x.device)
        torch._dynamo.graph_break()
        return self.block(x) + torch.arange(32, device=x.device)


def made() -> tuple[nn.Module, torch.Tensor]:
    return Net(), torch.zeros(4, 8, dtype=torch.long)


@pytest.fixture(scope="module")
def real() -> dict[str, object]:
    torch._dynamo.reset()
    model, tokens = made()
    return cacompile.explain(model, tokens, options=OPTIONS).to_dict()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_model_without_values_is_explained_as_one_with_them(real, kind, inside):
    mode = FakeTensorMode() if kind == "fake" else contextlib.nullcontext()
    device = torch.device(kind) if kind == "meta" else contextlib.nullcontext()
    with mode, device:
        model, tokens = made()
        before = {id(value): value for value in (*model.parameters(), *model.buffers(), model.table)}
        if inside:
            found = cacompile.explain(model, tokens, options=OPTIONS)
    if not inside:
        found = cacompile.explain(model, tokens, options=OPTIONS)
    assert found.to_dict() == real
    assert "masked_mm" in found.code("masked", graph=found.graphs - 1)
    assert "block.up.weight" in found.show("block.up.weight")
    after = {id(value): value for value in (*model.parameters(), *model.buffers(), model.table)}
    assert before.keys() == after.keys()
    assert all(isinstance(value, FakeTensor) if kind == "fake" else value.is_meta for value in after.values())
    assert kind == "meta" or not mode.allow_non_fake_inputs


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_layer_of_a_70b_llama_takes_no_memory(kind):
    """With embedding and head 3 billion parameters, 12 GB."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=1,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        use_cache=False,
    )
    with torch.device("meta") if kind == "meta" else FakeTensorMode():
        model = transformers.LlamaForCausalLM(config)
        tokens = torch.zeros(1, 512, dtype=torch.long)
    assert sum(param.numel() for param in model.parameters()) > 2.9e9
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = cacompile.explain(model, tokens, labels=tokens)
    code = found.code("masked")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    assert found.coverage == pytest.approx(1.0)
    assert found.semantic == pytest.approx(1.0)
    assert "dW of model.layers.0.mlp.up_proj.weight [28672x8192]: model.layers.0.mlp.neurons" in code
    assert code.count("torch.ops.cacompile.masked_mm") == 8
