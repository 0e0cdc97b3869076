"""Any known form becomes Examples, or an error that says where."""

import codecs
import contextlib
import random
import shutil
import subprocess
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cmqa.data.prepare import prepare
from lora_cmqa.data.sources import (
    read_conversations,
    read_examples,
    read_messages,
    write_conversations,
    write_messages,
)
from lora_cmqa.errors import CmqaError, DataError

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
        ("题目,内容\n一,二\n".encode(), "no column"),
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
