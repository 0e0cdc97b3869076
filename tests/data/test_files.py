"""Bytes to lines: encodings, zips, lines without end."""

import zipfile

import pytest

from lora_cmqa.data.files import encoding_of, on_disk, zip_files
from lora_cmqa.data.sources import read_examples
from lora_cmqa.errors import DataError


def test_encoding_is_found_by_looking(tmp_path):
    for name, content in (("a", "中文" * 100), ("b", "abc")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert encoding_of(on_disk(tmp_path / name)) == "utf-8-sig"


def test_a_hostile_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "up.zip", "w") as z:
        z.writestr("../evil.csv", "question,answer\n")
    with pytest.raises(DataError, match="leaves"):
        zip_files(tmp_path / "up.zip")
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.csv", b"0" * (20 << 20))
    with pytest.raises(DataError, match="zip bomb"):
        zip_files(tmp_path / "bomb.zip")


def test_a_zip_of_an_old_chinese_windows_has_its_names(tmp_path):
    """Its names are GBK without the mark for UTF-8, which zipfile reads as cp437."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as z:
        z.writestr("XXXX.csv", "question,answer\n孩子发烧怎么办,多喝水休息\n".encode())
    content = (tmp_path / "a.zip").read_bytes().replace(b"XXXX.csv", "内科".encode("gbk") + b".csv")
    (tmp_path / "a.zip").write_bytes(content)
    (file,) = zip_files(tmp_path / "a.zip")
    assert file.name.endswith(":内科.csv")
    assert [e.question for e in read_examples(tmp_path / "a.zip")] == ["孩子发烧怎么办"]


def test_a_truncated_zip_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a.csv", "question,answer\n" + "".join(f"问题{i},回答{i * 7919}\n" for i in range(5000)))
    whole = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="no readable zip"):
        zip_files(tmp_path / "cut.zip")
    (tmp_path / "bad.zip").write_bytes(whole[:200] + b"\0" * 50 + whole[250:])
    with pytest.raises(DataError, match="damaged inside the zip"):
        encoding_of(zip_files(tmp_path / "bad.zip")[0])
