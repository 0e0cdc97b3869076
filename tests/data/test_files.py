"""Bytes to lines: encodings, zips, lines without end."""

import zipfile

import pytest

from lora_cmqa.data.files import encoding_of, lines, on_disk, zip_files
from lora_cmqa.errors import DataError


def test_encoding_is_found_by_looking(tmp_path):
    for name, content in (("a", "中文" * 100), ("b", "abc")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert encoding_of(on_disk(tmp_path / name)) == "utf-8-sig"


def test_a_hundred_megabyte_line_is_refused(tmp_path):
    with (tmp_path / "x.csv").open("wb") as f:
        f.write(b"question,answer\n")
        for _ in range(100):
            f.write(b"a" * (1 << 20))
    with pytest.raises(DataError, match="a line of more than"):
        list(lines(on_disk(tmp_path / "x.csv")))


def test_a_hostile_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as z:
        z.writestr("../evil.csv", "question,answer\n")
    with pytest.raises(DataError, match="leaves"):
        zip_files(tmp_path / "up.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.csv", b"0" * (20 << 20))
    with pytest.raises(DataError, match="zip bomb"):
        zip_files(tmp_path / "bomb.zip")
