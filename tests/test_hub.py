"""hub.py asks for weights and tokenizer files only, and says the way without a hub."""

from __future__ import annotations

import fnmatch
import sys
import types

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from lora_cmqa import hub
from lora_cmqa.errors import ModelError


def comes(name: str) -> bool:
    """As the hub's client filters."""
    wanted = any(fnmatch.fnmatch(name, pattern) for pattern in hub.FILES)
    return wanted and not any(fnmatch.fnmatch(name, pattern) for pattern in hub.LEAVE)


def test_no_code_and_no_pickle_is_fetched():
    for name in (
        "config.json",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "qwen.tiktoken",
        "chat_template.jinja",
    ):
        assert comes(name), name
    for name in (
        "modeling_qwen.py",
        "pytorch_model.bin",
        "training_args.bin",
        "model.pt",
        "onnx/config.json",
        "a.gguf",
    ):
        assert not comes(name), name


def test_the_folder_comes_back(monkeypatch, tmp_path):
    monkeypatch.delenv("CMQA_HUB", raising=False)
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **k: asked.update(k, name=name) or str(tmp_path)
    )
    assert hub.fetch("a/b") == tmp_path
    assert asked == {"name": "a/b", "allow_patterns": hub.FILES, "ignore_patterns": hub.LEAVE}


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("no network"), ConnectionError("refused")])
def test_without_network_the_hint_names_the_local_folder(monkeypatch, error):
    monkeypatch.delenv("CMQA_HUB", raising=False)

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(ModelError) as caught:
        hub.fetch("Qwen/Qwen3-0.6B")
    assert "--model ./Qwen3-0.6B" in str(caught.value)
    assert "HF_ENDPOINT" in str(caught.value)


def test_modelscope_is_optional_and_asked_the_same(monkeypatch, tmp_path):
    monkeypatch.setenv("CMQA_HUB", "modelscope")
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(ModelError, match="pip install modelscope"):
        hub.fetch("a/b")
    asked = {}
    fake = types.SimpleNamespace(snapshot_download=lambda name, **k: asked.update(k, name=name) or str(tmp_path))
    monkeypatch.setitem(sys.modules, "modelscope", fake)
    assert hub.fetch("a/b") == tmp_path
    assert asked["allow_patterns"] == hub.FILES


def test_an_unknown_hub_is_refused(monkeypatch):
    monkeypatch.setenv("CMQA_HUB", "elsewhere")
    with pytest.raises(ModelError, match="CMQA_HUB is 'elsewhere'"):
        hub.fetch("a/b")
