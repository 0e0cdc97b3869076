"""`cmqa prepare --show`: the taught tokens apart from the others, in words and in colour."""

import json

import pytest

from lora_cmqa.cli import main
from lora_cmqa.data.show import print_shown, shown
from lora_cmqa.data.sources import write_messages
from lora_cmqa.models.tiny import byte_tokenizer

from .conftest import row


@pytest.fixture
def source(tmp_path):
    write_messages(tmp_path / "in.jsonl", [row(id="1"), row("手脚冰凉是什么原因", "注意保暖，适当运动。", id="2")])
    return str(tmp_path / "in.jsonl")


def test_what_is_taught_stands_apart(source):
    (first,) = shown(source, byte_tokenizer(), 1)
    read, taught = first["pieces"]
    assert read == ["<|im_start|>user\n孩子发烧怎么办<|im_end|>\n<|im_start|>assistant\n", False]
    assert taught == [row().answer + "<|im_end|>", True]
    assert first["taught"] == len(row().answer.encode()) + 1
    assert first["id"] == "1"


def test_the_verb_prints_it(source, tmp_path, capsys):
    assert main(["prepare", source, "--out", str(tmp_path / "o"), "--show", "3", "--lang", "en"]) == 0
    said = capsys.readouterr().out
    assert "2 rows read" in said
    assert f"assistant\n«{row().answer}<|im_end|>»" in said
    assert said.count("«") == 3  # two rows and the legend
    assert main(["prepare", source, "--out", str(tmp_path / "o"), "--show", "1", "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["shown"]
    assert only["pieces"][1][1] is True
    assert "shown" not in json.loads((tmp_path / "o" / "report.json").read_bytes())


def test_it_is_green_where_there_are_colours(source, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_shown(shown(source, byte_tokenizer(), 1), "tiny")
    assert f"\x1b[32m«{row().answer}" in capsys.readouterr().out


def test_a_wrong_model_is_said_before_the_work(source, tmp_path, capsys):
    assert main(["prepare", source, "--out", str(tmp_path / "o"), "--show", "1", "--model", "tinny"]) == 2
    assert "Did you mean tiny" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
