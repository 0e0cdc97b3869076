"""LoRA on a quantised base: the fast way, the plain way, and the same base written out, give one gradient."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn

from lora_cmqa.errors import AdapterError, ModelError
from lora_cmqa.lora.adapter import load_adapter, save_adapter
from lora_cmqa.lora.decoder import pack_losses, why_plain
from lora_cmqa.lora.family import read_body
from lora_cmqa.lora.inject import inject_lora, lora_parameters, remove_lora
from lora_cmqa.models.load import load_model
from lora_cmqa.models.quantized import QuantizedLinear, parameters_of, quantization_of
from lora_cmqa.models.tiny import tiny_folder, tiny_model

from .conftest import awaken, make_packed
from .test_decoder import gradients, relative_distance, take_the_plain_way

pytestmark = pytest.mark.usefixtures("exact_norms")
KINDS_OF_BASE = ("nf4", "int8")
ALLOWED = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 0.1}


def base(kind: str, dtype: str, quantization: str):
    return load_model(f"tiny-{kind}", dtype=dtype, quantization=quantization)[0]


def written_out(model):
    """The same base with plain weights: what its packed ones stand for."""
    for path, m in [(p, m) for p, m in model.named_modules() if isinstance(m, QuantizedLinear)]:
        plain = nn.Linear(m.in_features, m.out_features, bias=m.bias is not None, device="meta")
        plain.weight = nn.Parameter(m.quantized.dequantized(model.dtype), requires_grad=False)
        plain.bias = m.bias
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, plain)
    assert quantization_of(model) == "none"
    return model


def with_lora(model, **settings):
    return awaken(inject_lora(model, **({"r": 4, "lora_alpha": 8, "seed": 1} | settings)))


def measured(model):
    losses = pack_losses(model, make_packed())
    return losses.detach().double(), gradients(model, losses)


@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("quantization", KINDS_OF_BASE)
def test_gradients_are_those_of_the_base_written_out(kind, quantization, dtype, monkeypatch):
    packed = with_lora(base(kind, dtype, quantization))
    assert why_plain(packed) is None  # joined q k v and gate up too
    assert {w.dtype for w in lora_parameters(packed).values()} <= {torch.float32, torch.float64}
    losses, found = measured(packed)
    expected_losses, expected = measured(with_lora(written_out(base(kind, dtype, quantization))))
    assert relative_distance(found, expected) <= ALLOWED[dtype]
    assert (losses - expected_losses).norm() <= ALLOWED[dtype] * expected_losses.norm()
    take_the_plain_way(monkeypatch)
    losses, found = measured(packed)
    assert relative_distance(found, expected) <= ALLOWED[dtype]
    assert (losses - expected_losses).norm() <= ALLOWED[dtype] * expected_losses.norm()


@pytest.mark.parametrize("quantization", KINDS_OF_BASE)
def test_it_is_not_the_16_bit_base(kind, quantization):
    """So the comparison above compares something."""
    model = base(kind, "float32", quantization)
    other = tiny_model(kind, torch.float32)
    assert parameters_of(model) == sum(p.numel() for p in other.parameters())
    _, found = measured(with_lora(model))
    _, unquantised = measured(with_lora(other))
    assert relative_distance(found, unquantised) > 0.01


def test_recomputed_layers_have_the_same_gradient(kind):
    from lora_cmqa.lora.decoder import checkpoint_activations

    model = with_lora(base(kind, "float64", "nf4"))
    _, expected = measured(model)
    model.train()
    checkpoint_activations(model)
    _, found = measured(model)
    assert relative_distance(found, expected) <= 1e-10


def test_with_dropout_and_on_some_layers_only(kind):
    """Layers without an adapter pass the gradient on; dropout draws the same masks on both bases."""
    results = []
    for prepare in (lambda m: m, written_out):
        model = with_lora(
            prepare(base(kind, "float64", "nf4")), target_modules=("q_proj", "down_proj"), lora_dropout=0.3
        ).train()
        torch.manual_seed(7)
        results.append(measured(model)[1])
    assert relative_distance(*results) <= 1e-10


def test_joined_weights_are_never_written_out_together():
    """A part at a time: what passes is the largest part, not q, k and v below each other."""
    body = read_body(base("qwen2", "float32", "nf4"))
    parts = [rows for rows, _ in body.blocks[0].qkv.weight.pieces()]
    assert len(parts) == 3
    assert parts[0].stop == parts[1].start


def test_remove_lora_gives_the_packed_base_back(kind):
    model = base(kind, "float32", "nf4")
    before = {n: p.clone() for n, p in model.state_dict().items()}
    after = remove_lora(with_lora(model)).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_an_adapter_trained_on_it_loads_on_either_base(kind, tmp_path):
    model = with_lora(base(kind, "float32", "nf4"))
    save_adapter(model, tmp_path, base_model_name_or_path=str(tiny_folder(kind)))
    with torch.no_grad():
        expected = pack_losses(model, make_packed())
        again = pack_losses(load_adapter(base(kind, "float32", "nf4"), tmp_path), make_packed())
        wide = pack_losses(load_adapter(tiny_model(kind, torch.float32), tmp_path), make_packed())
    assert torch.equal(again, expected)
    assert not torch.allclose(wide, expected, rtol=1e-3)


def test_moved_and_cast_the_constants_stay_float32():
    model = base("qwen2", "float32", "nf4")
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.quantized.dequantized(torch.float32)
    model.to(torch.bfloat16).to("cpu")
    assert {t.dtype for t in layer.quantized.tensors.values()} == {torch.uint8, torch.float32}
    assert layer.quantized.values.data_ptr() == layer.weight.data_ptr()  # one copy
    assert torch.equal(layer.quantized.dequantized(torch.float32), before)


@pytest.mark.parametrize("modules", [("q_proj",), ("down_proj", "lm_head")])
def test_a_packed_layer_cannot_be_trained_whole(modules):
    with pytest.raises(AdapterError, match="is quantised"):
        inject_lora(base("qwen2", "float32", "nf4"), r=4, modules_to_save=modules, target_modules=("v_proj",))


def test_pefts_own_merge_does_not_change_the_packed_base():
    model = with_lora(base("qwen2", "float32", "nf4"))
    before = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    with pytest.raises(RuntimeError):
        model.merge_adapter()
    assert torch.equal(model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight, before)


def test_a_base_that_is_quantised_already_is_refused(tmp_path):
    folder = shutil.copytree(tiny_folder("qwen2"), tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match="quantised already"):
        load_model(folder, quantization="nf4")


def test_an_unknown_kind_is_named():
    with pytest.raises(ModelError, match="none, nf4, int8"):
        load_model("tiny", quantization="fp4")
