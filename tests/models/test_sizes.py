"""Shapes count what transformers' own classes hold, and a config.json reads as its named shape."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lora_cmqa.errors import ModelError
from lora_cmqa.lora.inject import inject_lora, lora_parameters
from lora_cmqa.models.sizes import SHAPES, Shape, shape_from_config, shape_of
from lora_cmqa.models.tiny import KINDS, tiny_model

CLASSES = {
    "qwen1": (Qwen2Config, Qwen2ForCausalLM),  # what qwen1.py loads it as
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}
# Totals that the publishers state (index files, model cards).
PUBLISHED = {
    "Qwen-7B": 7_721_324_544,
    "Qwen-14B": 14_167_290_880,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-8B": 8_190_735_360,
    "Meta-Llama-3-8B": 8_030_261_248,
    "gemma-3-270m": 268_098_176,
    "gemma-3-1b": 999_885_952,
}


def on_meta(shape: Shape, layers: int | None = None):
    config, model = CLASSES[shape.family]
    with torch.device("meta"):
        return model(
            config(
                vocab_size=shape.vocab,
                hidden_size=shape.hidden,
                intermediate_size=shape.ffn,
                num_hidden_layers=layers or shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.kv_heads,
                head_dim=shape.head_dim,
                tie_word_embeddings=shape.tied,
            )
        )


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_transformers_class(name):
    shape = SHAPES[name]
    model = on_meta(shape, layers=2)
    assert sum(p.numel() for p in model.parameters()) == shape.with_layers(2).parameters
    if name in PUBLISHED:
        assert shape.parameters == PUBLISHED[name]
    layer = model.get_decoder().layers[0]
    assert sum(p.numel() for p in layer.parameters()) == shape.layer_parameters


@pytest.mark.parametrize("kind", KINDS)
def test_the_tiny_shapes_and_their_adapters_are_the_tiny_models(kind):
    shape, model = SHAPES[f"tiny-{kind}"], tiny_model(kind)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.layers == model.config.num_hidden_layers
    assert shape.window == (16 if kind == "gemma3" else None)
    trained = lora_parameters(inject_lora(model, r=5))
    assert shape.lora_parameters(5) == sum(p.numel() for p in trained.values())


@pytest.mark.parametrize("name", ["Qwen3-8B", "Qwen2.5-7B", "Meta-Llama-3-8B", "gemma-3-1b"])
def test_a_config_json_reads_as_its_named_shape(name, tmp_path):
    shape = SHAPES[name]
    config = on_meta(shape).config
    config.dtype = "bfloat16"
    if shape.window:
        config.sliding_window = shape.window
    config.save_pretrained(tmp_path)
    assert shape_from_config(tmp_path / "config.json", name=name) == shape


def test_qwen_v1s_keys_old_and_new(tmp_path):
    new = {
        "model_type": "qwen",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 22016,
        "vocab_size": 151936,
        "bf16": True,
    }
    early = {"n_embd": 4096, "n_layer": 32, "n_head": 32, "ffn_hidden_size": 22016, "padded_vocab_size": 151936}
    for content in (new, early | {"architectures": ["QWenLMHeadModel"], "bf16": True}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert shape_from_config(tmp_path / "config.json", name="Qwen-7B") == SHAPES["Qwen-7B"]


def test_the_seeds_own_fixture(qwen_v1):
    shape = shape_of(qwen_v1 / "qwen_v1_tiny")
    assert (shape.hidden, shape.layers, shape.ffn, shape.tied) == (32, 4, 64, False)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Qwen/Qwen3-8B", "Qwen3-8B"),
        ("qwen2.5-7b-instruct", "Qwen2.5-7B"),
        ("google/gemma-3-270m-it", "gemma-3-270m"),
        ("Qwen/Qwen-7B-Chat", "Qwen-7B"),
        ("embedded", "gemma-3-270m"),
        ("tiny", "tiny-qwen2"),
    ],
)
def test_a_variant_has_the_shape_of_its_base(name, shape):
    assert shape_of(name) is SHAPES[shape]


def test_what_cannot_be_planned_is_said(tmp_path):
    with pytest.raises(ModelError, match="Did you mean qwen3-8b"):
        shape_of("Qwen3-8")
    file = tmp_path / "config.json"
    for content, word in (
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": "llama", "hidden_size": "big"}, "'big'"),
        ([1], "list"),
    ):
        file.write_text(json.dumps(content))
        with pytest.raises(ModelError, match=word):
            shape_of(tmp_path)
    with pytest.raises(ModelError, match="num_hidden_layers is 33; Qwen-7B has 32"):
        SHAPES["Qwen-7B"].with_layers(33)


def test_sizes_need_no_torch():
    code = "import sys; import lora_cmqa.models.sizes; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
