"""data_card.json: every byte that went in and came out is hashed, and the card travels with the adapter."""

import hashlib
import json

import lora_cmqa
from lora_cmqa.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from lora_cmqa.data.card import read_card
from lora_cmqa.data.prepare import prepare
from lora_cmqa.data.sources import read_messages, write_messages

from .conftest import row


def sha(file) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def rows(count: int) -> list:
    return [
        row(f"问题{i}：{'甲乙丙丁戊'[i % 5] * 3}怎么办{i * 7919}", f"{i * 104729}号：休息{i}天。", id=f"r{i}")
        for i in range(count)
    ]


def trained(folder, data, **more):
    return lora_cmqa.train(
        Config(
            model=ModelConfig(name_or_path="tiny", dtype="float32", device="cpu"),
            data=DataConfig(path=str(data), **more),
            lora=LoraConfig(r=2),
            train=TrainConfig(output_dir=str(folder), max_steps=1),
        )
    )


def test_case_41_every_row_can_be_traced_from_the_adapter_to_its_file(tmp_path):
    write_messages(tmp_path / "in.jsonl", rows(20))
    prepare(tmp_path / "in.jsonl", tmp_path / "data", licence="CC0")
    run = trained(tmp_path / "run", tmp_path / "data")
    card = json.loads((run / "data_card.json").read_bytes())
    assert card["inputs"] == {"in.jsonl": sha(tmp_path / "in.jsonl")}
    assert card["outputs"]["train.jsonl"] == sha(tmp_path / "data" / "train.jsonl")
    assert {e.id for e in read_messages(tmp_path / "data" / "train.jsonl")} <= {f"r{i}" for i in range(20)}
    model_card = (run / "README.md").read_text(encoding="utf-8")
    assert card["outputs"]["train.jsonl"] in model_card
    assert "licence CC0" in model_card
    assert str(tmp_path) not in json.dumps(card)


def test_case_41_rows_changed_after_prepare_are_told(tmp_path):
    write_messages(tmp_path / "in.jsonl", rows(20))
    prepare(tmp_path / "in.jsonl", tmp_path / "data")
    before = read_card(tmp_path / "data")
    file = tmp_path / "data" / "train.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace("休息", "服药", 1), encoding="utf-8")
    after = read_card(tmp_path / "data")
    assert after["outputs"]["train.jsonl"] == sha(file) != before["outputs"]["train.jsonl"]
    assert after["outputs"]["dev.jsonl"] == before["outputs"]["dev.jsonl"]
    write_messages(tmp_path / "in.jsonl", [*rows(19), row("问题被人改了", id="r19")])
    prepare(tmp_path / "in.jsonl", tmp_path / "b")
    assert read_card(tmp_path / "b")["inputs"] != before["inputs"]


def test_a_single_file_and_replay_rows_have_their_hashes_too(tmp_path):
    write_messages(tmp_path / "in.jsonl", rows(8))
    write_messages(tmp_path / "general.jsonl", rows(2))
    run = trained(tmp_path / "run", tmp_path / "in.jsonl", replay=str(tmp_path / "general.jsonl"))
    card = json.loads((run / "data_card.json").read_bytes())
    assert card == {
        "source": "in.jsonl",
        "licence": "unknown",
        "outputs": {"in.jsonl": sha(tmp_path / "in.jsonl"), "general.jsonl": sha(tmp_path / "general.jsonl")},
    }
