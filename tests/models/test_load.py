"""A name -> (model, tokenizer): what loads, what is refused and how it is said; no socket for a local path."""

from __future__ import annotations

import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from lora_cmqa.errors import ModelError
from lora_cmqa.models import load
from lora_cmqa.models.load import load_model, resolve
from lora_cmqa.models.tiny import KINDS, byte_tokenizer, tiny_folder, tiny_model


@pytest.fixture
def no_sockets(monkeypatch):
    def refused(*_, **__):
        raise AssertionError("a socket was opened")

    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refused)


@pytest.fixture
def folder(tmp_path):
    """A writable copy of the tiny model."""
    return shutil.copytree(tiny_folder(), tmp_path / "model")


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_models_load_frozen_and_equal_in_every_dtype(kind, no_sockets):
    model, tokenizer = load_model(f"tiny-{kind}", dtype="float64")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    for name, weight in tiny_model(kind).state_dict().items():
        assert torch.equal(model.state_dict()[name], weight.double())
    ids = torch.tensor([tokenizer("手毛很多").input_ids])
    out = model(ids).logits
    assert out.dtype == torch.float64
    assert 0.5 < out.std() < 2
    assert tokenizer.chat_template
    assert model.generation_config.eos_token_id == [258, 256]


@pytest.mark.parametrize("text", ["", "头痛 a\t\n", "e\u0301 é", "\x00\x7f\u200b\ufeff", "👩‍👩‍👧\r\n  x", "a" * 3000])
def test_the_byte_tokenizer_is_exact(text):
    for tokenizer in (byte_tokenizer(), load_model("tiny")[1]):
        ids = tokenizer(text).input_ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text


def test_specials_are_one_token_and_can_be_read_as_text():
    tokenizer = byte_tokenizer()
    assert tokenizer("<|im_end|>").input_ids == [258]
    assert tokenizer("<|im_end|>", split_special_tokens=True).input_ids == list(b"<|im_end|>")


def test_a_local_folder_opens_no_socket(folder, no_sockets):
    model, _ = load_model(folder)
    assert type(model).__name__ == "Qwen2ForCausalLM"


def test_plain_transformers_loads_the_tiny_folder():
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(tiny_folder(), trust_remote_code=False, local_files_only=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("embeded", "Did you mean embedded"),
        ("tiny-lama", "Did you mean tiny-llama"),
        ("./no/such/folder", "there is no model or folder './no/such/folder'"),
        ("nothing-like-it-at-all", "--model takes embedded, tiny"),
    ],
)
def test_unknown_names_get_the_nearest(name, said, no_sockets):
    with pytest.raises(ModelError) as caught:
        resolve(name)
    assert said in str(caught.value)


def test_an_owner_and_name_go_to_the_hub(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(load.hub, "fetch", lambda name: asked.append(name) or tmp_path)
    assert resolve("Qwen/Qwen3-0.6B") == tmp_path
    assert asked == ["Qwen/Qwen3-0.6B"]


def test_what_is_no_model_is_said(folder):
    with pytest.raises(ModelError, match="this is a file"):
        resolve(folder / "config.json")
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="not readable JSON"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        load_model(folder)
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="this is an adapter"):
        load_model(folder)


def test_pickled_weights_are_never_opened(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pickles \(pytorch_model.bin\), which are never opened"):
        load_model(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        load_model(folder)


def test_missing_misshapen_and_damaged_weights_are_refused(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    norm = "model.layers.1.input_layernorm.weight"
    save_file({k: v for k, v in tensors.items() if k != norm}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"1 weights are missing .* {norm}"):
        load_model(folder)
    save_file(tensors | {norm: torch.ones(7)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError):
        load_model(folder)
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"1 of 1 weight files are missing: model-2\.safetensors"):
        load_model(folder)


def test_an_unknown_model_type_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nothing"}))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_model(folder)


def test_fewer_layers_of_a_native_model(capsys):
    cut, _ = load_model("tiny-gemma3", num_hidden_layers=2)
    assert (len(cut.model.layers), len(cut.config.layer_types)) == (2, 2)
    assert "Keeping the first 2 of 4 layers" in capsys.readouterr().err
    with pytest.raises(ModelError, match="num_hidden_layers is 9; the model has 4"):
        load_model("tiny-gemma3", num_hidden_layers=9)


def test_weights_of_more_layers_than_the_config_says(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2, "layer_types": None}))
    with pytest.raises(ModelError, match="hold a layer 3, this config says 2"):
        load_model(folder)
    with pytest.raises(ModelError, match="hold a layer 3"):
        load_model(folder, num_hidden_layers=1)


def test_device_and_dtype(monkeypatch):
    with pytest.raises(ModelError, match="dtype 'int7' is unknown"):
        load_model("tiny", dtype="int7")
    with pytest.raises(ModelError, match="none that torch knows"):
        load_model("tiny", device="gpu")
    with pytest.raises(ModelError, match="usable GPUs"):
        load_model("tiny", device="cuda:77")
    for computes, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(load, "computes_in_bfloat16", lambda _, c=computes: c)
        assert load_model("tiny", dtype="auto")[0].dtype == dtype


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_the_cache_folder_stands_complete_or_not_at_all(tmp_path, monkeypatch):
    from lora_cmqa.models.cache import write_once

    monkeypatch.setenv("CMQA_CACHE", str(tmp_path / "cache"))

    def fails(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_once("a", fails)
    assert list((tmp_path / "cache").iterdir()) == []

    def builds(folder):
        # another process finishes first
        other = tmp_path / "cache" / "a"
        other.mkdir()
        (other / "file").write_text("theirs")
        (folder / "file").write_text("ours")

    assert (write_once("a", builds) / "file").read_text() == "theirs"
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["a"]


def test_an_unwritable_cache_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CMQA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="CMQA_CACHE="):
        load_model("tiny")


# ---- a tokenizer from its files --------------------------------------------------------------------------------------


def saved(tokenizer, folder):
    """What it would write, but for where it came from."""
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    kept = {k: v for k, v in config.items() if k not in ("is_local", "local_files_only")}
    return kept, {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "tokenizer_config.json"}


@pytest.mark.parametrize("name", ["tiny", "embedded"])
def test_a_tokenizer_of_its_files_is_the_one_that_transformers_loads(name, tmp_path):
    folder = resolve(name)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    ours = load._of_its_files(folder, json.loads((folder / "tokenizer_config.json").read_text()))
    text = "发烧怎么办？ <|im_end|><eos><end_of_turn> 38.5°C\n  two  spaces"
    assert ours(text).input_ids == theirs(text).input_ids
    assert ours(text, split_special_tokens=True).input_ids == theirs(text, split_special_tokens=True).input_ids
    ids = theirs(text).input_ids
    assert ours.decode(ids) == theirs.decode(ids)
    for attribute in ("special_tokens_map", "all_special_ids", "padding_side", "model_max_length", "chat_template"):
        assert getattr(ours, attribute) == getattr(theirs, attribute), attribute
    assert saved(ours, tmp_path / "ours") == saved(theirs, tmp_path / "theirs")


@pytest.mark.parametrize(
    ("file", "more"),
    [("special_tokens_map.json", {}), (None, {"added_tokens_decoder": {"3": {"content": "<x>", "special": True}}})],
    ids=["older file", "tokens as objects"],
)
def test_what_more_there_is_to_put_together_is_left_to_transformers(tmp_path, file, more):
    folder = tmp_path / "model"
    shutil.copytree(resolve("tiny"), folder)
    if file:
        (folder / file).write_text("{}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert load._of_its_files(folder, config) is not None or file
    assert load._of_its_files(folder, config | more) is None
