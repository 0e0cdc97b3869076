from __future__ import annotations

import json

import pytest

from lora_cmqa.errors import AdapterError, ModelError
from lora_cmqa.lora.fingerprint import check_fingerprint, write_fingerprint
from lora_cmqa.models.fingerprint import differences, fingerprint

MIB = 1 << 20


@pytest.fixture
def base(tmp_path):
    """A base's folder with a weight file of 5 MiB (of random-looking bytes: nothing here reads tensors)."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, "model_type": "qwen2"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(i % 251 for i in range(1000)) * (5 * MIB // 1000))
    return folder


@pytest.fixture
def run(tmp_path, base):
    folder = tmp_path / "run"
    folder.mkdir()
    write_fingerprint(folder, base)
    return folder


def overwrite(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_the_same_base_elsewhere_is_the_same(run, base, tmp_path):
    check_fingerprint(run, base.rename(tmp_path / "moved"))


def test_where_it_lies_and_who_wrote_it_do_not_count(run, base):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(config | {"transformers_version": "9", "_name_or_path": "x", "use_cache": False, "dtype": "float32"})
    )
    check_fingerprint(run, base)


@pytest.mark.parametrize(
    "at", [0, MIB - 1, 5 * MIB // 2 - 1000, -1500], ids=["first", "end of first", "middle", "last"]
)
def test_one_changed_byte_of_the_weights(run, base, at):
    overwrite(base / "model.safetensors", at)
    with pytest.raises(AdapterError, match=r"model\.safetensors differ"):
        check_fingerprint(run, base)


def test_full_sees_what_the_samples_do_not(base):
    a, a_full = fingerprint(base), fingerprint(base, full=True)
    overwrite(base / "model.safetensors", int(1.5 * MIB))
    assert differences(a, fingerprint(base)) == []
    assert differences(a_full, fingerprint(base, full=True)) == ["model.safetensors"]


def test_a_file_that_grew(run, base):
    with (base / "model.safetensors").open("ab") as f:
        f.write(b"\0")
    with pytest.raises(AdapterError, match=r"model\.safetensors differ"):
        check_fingerprint(run, base)


def test_every_part_that_differs_is_named(run, base):
    (base / "config.json").write_text(json.dumps({"hidden_size": 9, "model_type": "qwen2"}))
    (base / "tokenizer.json").write_text('{"a": 1}')
    (base / "model-2.safetensors").write_bytes(b"more")
    with pytest.raises(AdapterError, match=r"config\.json; tokenizer\.json; model-2\.safetensors differ"):
        check_fingerprint(run, base)


def test_nothing_to_compare_with(run, base):
    (run / "fingerprint.json").unlink()
    with pytest.raises(AdapterError, match="no fingerprint"):
        check_fingerprint(run, base)
    (base / "config.json").unlink()
    with pytest.raises(ModelError, match=r"no config\.json"):
        fingerprint(base)
