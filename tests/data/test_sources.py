"""Any known form becomes Examples, or an error that says where."""

import codecs
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cmqa.data.prepare import load_split, prepare, print_summary
from lora_cmqa.data.sources import (
    read_conversations,
    read_examples,
    read_messages,
    read_source,
    write_conversations,
    write_messages,
)
from lora_cmqa.errors import CmqaError, DataError
from lora_cmqa.hub import fetch_dataset

from .conftest import cmqa, row


@pytest.mark.parametrize(
    "encode", [lambda t: t.encode(), lambda t: codecs.BOM_UTF8 + t.encode(), lambda t: t.encode("gb18030")]
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_every_encoding_and_line_end(tmp_path, encode, end):
    text = 'question,answer\n"孩子咳嗽三天了，\n要不要紧","建议先观察，多喝水。"\n'.replace("\n", end)
    (tmp_path / "数据.csv").write_bytes(encode(text))
    (example,) = read_examples(tmp_path / "数据.csv")
    assert example.question == f"孩子咳嗽三天了，{end}要不要紧"
    assert example.answer == "建议先观察，多喝水。"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"question,answer\n", "no row"),
        ("题目,内容\n一,二\n".encode(), "line 1: .*题目, 内容 are no form known"),
        ("question,内容\n一,二\n".encode(), "line 1.*no column answer or response"),
        (b"question,answer\na,b,c\n", "3 fields"),
        (b'question,answer\n"abc,d\n', "whole CSV"),
        (random.Random(5).randbytes(4000), "no text"),
        ("question,answer\n繁體中文的問題,這是繁體的回答\n".encode("big5"), "neither UTF-8 nor GB18030"),
        (b"question,answer\n" + "很长的问题很长的问题很长的问题很长的问题".encode() + b"\xe5", "broken UTF-8"),
    ],
)
def test_a_bad_file_is_a_data_error(tmp_path, content, says):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=says) as e:
        read_examples(tmp_path / "x.csv")
    assert "x.csv" in str(e.value)


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_no_bytes_do_anything_but_read_or_say_what_is_wrong(content):
    with tempfile.TemporaryDirectory() as folder:
        for name in ("x.csv", "x.jsonl"):
            file = Path(folder) / name
            file.write_bytes(content)
            with contextlib.suppress(CmqaError):
                read_examples(file)


def test_both_written_forms_read_back(tmp_path):
    rows = [row(id="1", source="a.csv", split="train"), row("第二个问题", id="2", source="a.csv", split="dev")]
    write_messages(tmp_path / "m.jsonl", rows)
    assert read_messages(tmp_path / "m.jsonl") == rows
    write_conversations(tmp_path / "c.json", rows)
    assert [(e.id, e.messages) for e in read_conversations(tmp_path / "c.json")] == [(e.id, e.messages) for e in rows]


def test_a_zip_and_a_folder_of_zips_read_like_the_folder(tmp_path):
    folder = cmqa(tmp_path / "d")
    (tmp_path / "z").mkdir()
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as both:
        for name in ("questions", "answers"):
            both.write(folder / f"{name}.csv", f"cMQA/{name}.csv")
            with zipfile.ZipFile(tmp_path / "z" / f"{name}.zip", "w") as z:
                z.write(folder / f"{name}.csv", f"{name}.csv")
    plain = read_examples(folder)
    assert read_examples(tmp_path / "all.zip") == read_examples(tmp_path / "z") == plain
    assert prepare(tmp_path / "all.zip", tmp_path / "o", dev=0, test=0)["kept"] == 1


@pytest.mark.skipif(shutil.which("zip") is None, reason="needs the zip command to split an archive")
def test_a_split_archive_is_read_as_the_one_it_was(tmp_path):
    noise = "".join(f"{i},1,{random.Random(i).random()}很长的回答\n" for i in range(6000))
    folder = cmqa(tmp_path / "d", answers="ans_id,question_id,content\n" + noise)
    subprocess.run(["zip", "-q", "-s", "64k", "../s.zip", "answers.csv", "questions.csv"], cwd=folder, check=True)
    assert (tmp_path / "s.z01").exists()
    assert read_examples(tmp_path / "s.zip") == read_examples(folder)
    (tmp_path / "s.z01").unlink()
    with pytest.raises(DataError, match="split archive"):
        read_examples(tmp_path / "s.zip")


# ---- forms ---------------------------------------------------------------------------------------------------------


def jsonl(file: Path, *rows) -> Path:
    file.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return file


def turns(example):
    return [(m.role, m.content) for m in example.messages]


@pytest.mark.parametrize("as_list", [True, False], ids=["JSON", "JSON lines"])
@pytest.mark.parametrize(
    ("raw", "read"),
    [
        ({"instruction": "问", "input": "", "output": "答"}, [("user", "问"), ("assistant", "答")]),
        ({"instruction": "问", "input": "更多", "output": "答"}, [("user", "问\n更多"), ("assistant", "答")]),
        (
            {"instruction": "问", "input": None, "output": "答", "system": "您是医生", "history": [["早", "好"]]},
            [("system", "您是医生"), ("user", "早"), ("assistant", "好"), ("user", "问"), ("assistant", "答")],
        ),
        (
            {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}], "system": "您"},
            [("system", "您"), ("user", "问"), ("assistant", "答")],
        ),
        (
            {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]},
            [("user", "问"), ("assistant", "答")],
        ),
        ({"department": "内科", "title": "题", "ask": "问", "answer": "答"}, [("user", "题\n问"), ("assistant", "答")]),
        ({"title": "问", "question": "问得细", "answer": "答"}, [("user", "问得细"), ("assistant", "答")]),
        ({"question": "问", "answer": None}, [("user", "问"), ("assistant", "")]),
    ],
)
def test_every_form_as_json_and_as_json_lines(tmp_path, as_list, raw, read):
    if as_list:
        (tmp_path / "x.json").write_text(json.dumps([raw], ensure_ascii=False), encoding="utf-8")
    else:
        jsonl(tmp_path / "x.json", raw)
    (example,) = read_examples(tmp_path / "x.json")
    assert turns(example) == read
    assert example.source == "x.json"


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"conversations": [{"from": "tool", "value": "x"}]}, "'tool' is no role"),
        ({"conversations": []}, "list of turns"),
        ({"conversations": [{"from": "user"}]}, "no text under 'value'"),
        ({"id": 3}, "'conversations' is missing"),
        ("text", "an object a row"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, bad, says):
    good = {"conversations": [{"from": "user", "value": "问"}, {"from": "assistant", "value": "答"}]}
    with pytest.raises(DataError, match=says) as e:
        read_examples(jsonl(tmp_path / "x.jsonl", good, bad))
    assert e.value.row == 2


def test_an_alpaca_history_that_is_no_pair_is_named(tmp_path):
    with pytest.raises(DataError, match="pair of question and answer"):
        read_examples(jsonl(tmp_path / "x.jsonl", {"instruction": "问", "output": "答", "history": [["早"]]}))


# ---- folders and zips of several files -----------------------------------------------------------------------------


def departments(folder: Path) -> Path:
    (folder / "内科").mkdir(parents=True)
    (folder / "README.md").write_text("about")
    (folder / "内科" / "心脏.csv").write_text("department,title,ask,answer\n内科,心慌,三天了,建议检查。\n", "gb18030")
    jsonl(folder / "外科.jsonl", {"instruction": "脚扭了", "input": "", "output": "先冷敷。", "id": 7})
    (folder / "more.json").write_text('[{"question": "咳嗽", "answer": "多喝水。"}]', encoding="utf-8")
    return folder


def test_a_folder_of_files_of_any_form(tmp_path, capsys):
    folder = departments(tmp_path / "d")
    source = read_source(folder)
    assert [(e.id, e.source, e.question) for e in source.examples] == [
        ("more.json:1", "more.json", "咳嗽"),
        ("内科/心脏.csv:2", "内科/心脏.csv", "心慌\n三天了"),
        ("外科.jsonl:7", "外科.jsonl", "脚扭了"),
    ]
    assert source.ignored == ["README.md"]
    (folder / "notes.txt").write_text("x")
    report = prepare(folder, tmp_path / "o", dev=0, test=0)
    assert report["sources"][0]["ignored_files"] == ["README.md", "notes.txt"]
    print_summary(report)
    said = capsys.readouterr().out
    assert "notes.txt" in said
    assert "README" not in said
    assert set(json.loads((tmp_path / "o" / "data_card.json").read_bytes())["inputs"]) == set(source.files)


def test_a_zip_of_files_of_any_form_reads_like_the_folder(tmp_path):
    folder = departments(tmp_path / "d")
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as z:
        for file in sorted(folder.rglob("*.*")):
            z.write(file, file.relative_to(folder))
    assert read_examples(tmp_path / "d.zip") == read_examples(folder)


def test_a_folder_has_its_name_however_it_is_written(tmp_path, monkeypatch):
    folder = departments(tmp_path / "d")
    monkeypatch.chdir(folder / "内科")
    assert read_source("..").name == read_source(folder).name == "d"
    assert read_source("..").examples == read_source(folder).examples


def test_files_named_for_splits_are_the_official_split(tmp_path):
    rows = [{"question": f"问题{i}怎么办", "answer": f"第{i}种回答。"} for i in range(3)]
    for name, r in zip(("train.jsonl", "validation-00.jsonl", "test.jsonl"), rows, strict=True):
        jsonl(tmp_path / name, r)
    assert [e.split for e in read_examples(tmp_path)] == ["test", "train", "dev"]
    for name in ("validation-00.jsonl", "test.jsonl"):
        (tmp_path / name).unlink()
    assert [e.split for e in read_examples(tmp_path)] == [None]  # all of it training rows: no split to keep


def test_a_folder_without_rows_or_with_half_a_release_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no CSV, JSON or JSON lines"):
        read_examples(tmp_path)
    (tmp_path / "question.csv").write_text("question_id,content\n1,x\n")
    with pytest.raises(DataError, match=r"question.csv is here without its answers.csv"):
        read_examples(tmp_path)


def test_a_split_without_rows_reads_as_none(tmp_path):
    write_messages(tmp_path / "in.jsonl", [row()])
    prepare(tmp_path / "in.jsonl", tmp_path / "o", dev=0, test=0)
    assert load_split(tmp_path / "o", "dev") == []
    assert len(read_examples(tmp_path / "o")) == 1


# ---- a dataset of the hub ------------------------------------------------------------------------------------------


def fake_datasets(monkeypatch, load, version="4.1.0"):
    module = types.ModuleType("datasets")
    module.__version__, module.load_dataset = version, load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_a_dataset_by_name_is_rows_of_a_known_form(tmp_path, monkeypatch):
    asked = []

    def load(*args, **more):
        asked.append((args, more))
        return {
            "train": [{"instruction": "问题", "input": None, "output": "答案在此。"}] * 2,
            "validation": [{"instruction": "另一个问题", "input": "", "output": "另一个答案。"}],
        }

    fake_datasets(monkeypatch, load)
    examples = read_examples("hf:owner/name:config@main")
    assert asked == [(("owner/name", "config"), {"revision": "main"})]
    assert [(e.id, e.source, e.split) for e in examples] == [
        ("train:1", "train", "train"),
        ("train:2", "train", "train"),
        ("validation:1", "validation", "dev"),
    ]
    report = prepare("hf:owner/name", tmp_path / "o")
    assert (report["source"], report["read"], report["reasons"]) == ("hf:owner/name", 3, {"duplicate": 1})
    card = json.loads((tmp_path / "o" / "data_card.json").read_bytes())
    assert list(card["inputs"]) == ["hf:owner/name"]


def test_a_dataset_that_cannot_be_had_is_a_data_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="not installed") as e:
        read_examples("hf:owner/name")
    assert "lora-cmqa[datasets]" in e.value.hint

    def fails(*_, **__):
        raise OSError("no network here")

    fake_datasets(monkeypatch, fails)
    with pytest.raises(DataError, match="no network here"):
        read_examples("hf:owner/name")
    fake_datasets(monkeypatch, fails, version="3.6.0")
    with pytest.raises(DataError, match=r"3.6.0 may run a dataset's own script"):
        read_examples("hf:owner/name")
    monkeypatch.setenv("CMQA_HUB", "modelscope")
    with pytest.raises(DataError, match="CMQA_HUB=modelscope"):
        read_examples("hf:owner/name")


def test_a_mistyped_path_is_no_download(monkeypatch):
    fake_datasets(monkeypatch, lambda *_, **__: pytest.fail("a download nobody asked for"))
    with pytest.raises(DataError, match="no such file or folder") as e:
        read_examples("dataa/cmqa")
    assert "hf:dataa/cmqa" in e.value.hint


def test_the_real_package_gives_the_same_rows(tmp_path):
    pytest.importorskip("datasets")
    write_messages(tmp_path / "train.jsonl", [row(id="1"), row("第二个问题", id="2")])
    splits = fetch_dataset(str(tmp_path))
    assert [r["id"] for r in splits["train"]] == ["1", "2"]
    assert [turns(e) for e in read_examples(f"hf:{tmp_path}")] == [turns(row()), turns(row("第二个问题"))]
