"""Tokens kept between runs: the same to the bit as encoded anew, whole or not at all, and no more than is allowed."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lora_cmqa
from lora_cmqa.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig, config_hash
from lora_cmqa.core import Example, Message
from lora_cmqa.data import token_cache
from lora_cmqa.data.sources import write_messages
from lora_cmqa.data.stream import BatchStream, rows_sha256
from lora_cmqa.data.template import CHATML, ChatTemplate, encode_all
from lora_cmqa.data.token_cache import TokenRows, encode_cached
from lora_cmqa.models.tiny import byte_tokenizer

from .conftest import row

SETTINGS: dict[str, Any] = {"max_length": 80, "on_too_long": "drop", "system": None}


@pytest.fixture(autouse=True)
def small(monkeypatch) -> None:
    monkeypatch.setattr(token_cache, "SMALLEST", 3)


@pytest.fixture(scope="module")
def template() -> ChatTemplate:
    return ChatTemplate.from_tokenizer(byte_tokenizer())


def rows(count: int = 9) -> list[Example]:
    return [row(f"问题{i}", "好的，请休息。" * (i % 4), id=f"r{i}") for i in range(count)]


def same(one, other) -> bool:
    return len(one) == len(other) and all(
        (a.id, a.question_id) == (b.id, b.question_id)
        and np.array_equal(a.input_ids, b.input_ids)
        and np.array_equal(a.labels, b.labels)
        and (a.input_ids.dtype, a.labels.dtype) == (b.input_ids.dtype, b.labels.dtype)
        for a, b in zip(one, other, strict=True)
    )


def cached(folder: Path, template: ChatTemplate, examples=None, max_bytes: int = 1 << 30, **settings):
    return encode_cached(examples or rows(), template, folder=folder, max_bytes=max_bytes, **(SETTINGS | settings))


def test_kept_tokens_are_those_made_anew(tmp_path, template, monkeypatch):
    plain, account = encode_all(rows(), template, **SETTINGS)
    assert account.too_long and account.no_supervised  # noqa: PT018 - the account holds something to keep
    first, report = cached(tmp_path, template)
    monkeypatch.setattr(token_cache, "encode_all", lambda *_, **__: pytest.fail("encoded a second time"))
    second, again = cached(tmp_path, template)
    assert same(first, plain)
    assert same(second, plain)
    assert report == again == account
    assert isinstance(second, TokenRows)
    assert isinstance(second.input_ids.base, np.memmap)
    assert rows_sha256(second) == rows_sha256(plain)
    assert same(second[1:3], plain[1:3])
    assert same([second[-1]], [plain[-1]])
    with pytest.raises(IndexError):
        second[len(plain)]
    batches = [[b for b, _ in BatchStream(r, rows_per_step=2, max_tokens=200, seed=3)] for r in (plain, second)]
    for a, b in zip(*batches, strict=True):
        assert a.example_ids == b.example_ids
        assert all(np.array_equal(x.input_ids, y.input_ids) for x, y in zip(a.packs, b.packs, strict=True))


def test_whatever_decides_a_token_is_in_the_key(tmp_path, template):
    other = byte_tokenizer()
    other.add_tokens(["咳嗽"])
    ways = [
        {},
        {"examples": rows()[::-1]},
        {"examples": [replace(rows()[0], id="x"), *rows()[1:]]},
        {"examples": [*rows()[:-1], row("问题8", "好的，请休息", id="r8")]},
        {"examples": [replace(e, messages=(Message("system", ""), *e.messages)) for e in rows()]},
        {"max_length": 81},
        {"system": "您是医生"},
        {"on_too_long": "shorten"},
        {"template": ChatTemplate(byte_tokenizer(), CHATML + "{# another #}")},
        {"template": ChatTemplate.from_tokenizer(other)},
    ]
    for count, way in enumerate(ways, start=1):
        cached(tmp_path, **({"template": template} | way))
        assert len(list(tmp_path.iterdir())) == count, way
    cached(tmp_path, ChatTemplate.from_tokenizer(byte_tokenizer()))  # the first again, by a tokenizer loaded anew
    assert len(list(tmp_path.iterdir())) == len(ways)


@pytest.mark.parametrize("name", ["input_ids.npy", "labels.npy", "rows.json", "manifest.json"])
@pytest.mark.parametrize("how", ["a bit", "cut", "gone"])
def test_a_damaged_entry_is_said_and_made_anew(tmp_path, template, capsys, name, how):
    plain, _ = encode_all(rows(), template, **SETTINGS)
    cached(tmp_path, template)
    (entry,) = tmp_path.iterdir()
    file = entry / name
    content = bytearray(file.read_bytes())
    if how == "a bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.unlink()
    found, _ = cached(tmp_path, template)
    assert same(found, plain)
    assert entry.name in capsys.readouterr().err
    assert same(cached(tmp_path, template)[0], plain)
    assert capsys.readouterr().err == ""


def test_a_write_that_fails_leaves_nothing_and_stops_nobody(tmp_path, template, monkeypatch, capsys):
    plain, _ = encode_all(rows(), template, **SETTINGS)

    def full(file, array):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.np, "save", full)
    assert same(cached(tmp_path, template)[0], plain)
    assert "No space left" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("x")
    assert same(cached(tmp_path / "file", template)[0], plain)


def test_the_folder_stays_within_its_limit_and_the_oldest_go(tmp_path, template):
    cached(tmp_path, template, max_length=80)
    (first,) = tmp_path.iterdir()
    size = sum(f.stat().st_size for f in first.iterdir())
    os.utime(first, (1, 1))
    cached(tmp_path, template, max_length=81, max_bytes=int(2.5 * size))
    second = next(p for p in tmp_path.iterdir() if p != first)
    os.utime(second, (2, 2))
    cached(tmp_path, template, max_length=80)  # used again: now the second is the oldest
    killed = tmp_path / ".killed.abc"
    killed.mkdir()
    os.utime(killed, (1, 1))
    cached(tmp_path, template, max_length=82, max_bytes=int(2.5 * size))
    left = set(tmp_path.iterdir())
    assert first in left
    assert second not in left
    assert killed not in left
    assert len(left) == 2


def test_what_is_too_large_too_small_or_unwanted_is_not_kept(tmp_path, template):
    for more in ({"max_bytes": 100}, {"max_bytes": 0}, {"examples": rows(2)}):
        assert len(cached(tmp_path, template, **more)[0])
    assert list(tmp_path.iterdir()) == []


def test_a_training_is_the_same_with_and_without(tmp_path, monkeypatch):
    monkeypatch.setenv("CMQA_CACHE", str(tmp_path / "cache"))
    write_messages(tmp_path / "in.jsonl", [row(f"问题{i}", f"请休息{i}天。", id=str(i)) for i in range(12)])

    def trained(name: str, gib: float) -> str:
        config = Config(
            model=ModelConfig(name_or_path="tiny", dtype="float32", device="cpu"),
            data=DataConfig(path=str(tmp_path / "in.jsonl"), token_cache_gib=gib),
            lora=LoraConfig(r=2),
            train=TrainConfig(output_dir=str(tmp_path / name), max_steps=3, gradient_accumulation_steps=2),
        )
        run = lora_cmqa.train(config)
        return hashlib.sha256((run / "adapter_model.safetensors").read_bytes()).hexdigest()

    without = trained("without", 0)
    assert not (tmp_path / "cache" / "tokens").exists()
    assert trained("first", 1) == without
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1
    assert trained("second", 1) == without


def test_the_limit_is_no_part_of_what_a_run_computes():
    one, other = (Config(data=DataConfig(token_cache_gib=g)) for g in (0, 8))
    assert config_hash(one) == config_hash(other)
