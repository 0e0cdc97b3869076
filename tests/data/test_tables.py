"""Rows from CSV, a JSON list and JSON lines, in bounded memory."""

import json
import tempfile
import tracemalloc
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cmqa.data import tables
from lora_cmqa.data.files import on_disk
from lora_cmqa.data.sources import read_examples
from lora_cmqa.data.tables import json_rows
from lora_cmqa.errors import DataError

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


CHUNKS = (1, 7, 1 << 20)


def rows_of(text: str, chunk: int = 1 << 20) -> list:
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(tables, "_CHUNK", chunk):
        file = Path(folder) / "x.json"
        file.write_text(text, encoding="utf-8")
        return [r for _, r in json_rows(on_disk(file))]


@given(st.lists(values, min_size=1, max_size=5), st.sampled_from([None, 1]), st.sampled_from(CHUNKS))
@settings(max_examples=80, deadline=None)
def test_a_list_read_in_pieces_is_the_list(rows, indent, chunk):
    assert rows_of(json.dumps(rows, ensure_ascii=False, indent=indent), chunk) == rows


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[{"a": 1},\n {"a": 2}', 2),
        ('[{"a": 1}\n {"a": 2}]', 2),
        ('[\n{"a": 1},\n\n]', 4),
        ('[{"a": 1}]\n[{"a": 2}]', 2),
        ('[\n{"a": "never closed]', 2),
        ("[1, 2", 1),
        ("[" * 5_000, 1),
    ],
)
def test_a_broken_list_is_named_with_its_line(chunk, text, line):
    with pytest.raises(DataError, match="not whole JSON") as e:
        rows_of(text, chunk)
    assert e.value.row == line


def test_an_empty_list_and_an_empty_file_are_named():
    for text in ("[]", " [ \n ] ", "  \n "):
        with pytest.raises(DataError, match="empty"):
            rows_of(text)


@pytest.mark.parametrize(
    ("name", "before", "says"),
    [
        ("x.csv", "question,answer\n", "a line of more than"),
        ("x.csv", 'question,answer\n"', "a line of more than"),
        ("x.jsonl", '{"question": "', "a line of more than"),
        ("x.json", '[{"question": "', "a row of more than"),
    ],
)
def test_a_line_of_100_megabytes_is_refused_in_bounded_memory(tmp_path, name, before, says):
    with (tmp_path / name).open("w", encoding="utf-8") as f:
        f.write(before)
        for _ in range(100):
            f.write("a" * (1 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=says):
            read_examples(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_a_quote_that_is_never_closed_is_refused_in_bounded_memory(tmp_path):
    with (tmp_path / "x.csv").open("w", encoding="utf-8") as f:
        f.write('question,answer\n"')
        for _ in range(200_000):
            f.write("一行又一行的文字，没有关上的引号" + "\n")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="not whole CSV"):
            read_examples(tmp_path / "x.csv")
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()


def test_a_long_list_is_read_in_bounded_memory(tmp_path):
    with (tmp_path / "x.json").open("w", encoding="utf-8") as f:
        f.write("[")
        f.write(",".join(['{"question": "孩子发烧怎么办", "answer": "' + "多喝水" * 300 + '"}'] * 20_000))
        f.write("]")
    tracemalloc.start()
    try:
        assert sum(1 for _ in json_rows(on_disk(tmp_path / "x.json"))) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 30 << 20
    finally:
        tracemalloc.stop()
