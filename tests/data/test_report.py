"""report.html: in both languages, the same bytes from the same rows, no network, no path of this machine."""

import json
import re

import pytest

from lora_cmqa.data.overview import LAST, STEP, groups, lengths, outliers
from lora_cmqa.data.prepare import prepare, print_summary
from lora_cmqa.data.sources import write_messages
from lora_cmqa.messages import set_language

from .conftest import row


@pytest.fixture
def source(tmp_path):
    rows = [
        row("孩子<script>alert(1)</script>发烧，13812345678", "建议多喝水，0。7mg。", id="a"),
        row("手脚冰凉是什么原因造成的", "注意保暖，适当运动，少吃生冷的食物，不要熬夜。", id="b"),
        row("手脚冰凉是什么原因造成的？", "请拨打咨询电话400-045-6799。", id="c"),
        row("我不想活了", "请马上告诉家人，并到急诊。", id="d"),
        row("手脚冰凉是什么原因造成呢", "多泡脚，规律作息，必要时到中医科调理身体。", id="e"),
    ]
    write_messages(tmp_path / "in.jsonl", rows)
    return tmp_path / "in.jsonl"


@pytest.fixture(params=["en", "zh"])
def language(request):
    set_language(request.param)
    yield request.param
    set_language(None)


SAYS = {
    "en": [
        "Length in characters",
        "Groups of like rows",
        "What became of the rows",
        "<th>before</th>",
        "5 rows read, 4 kept",
    ],
    "zh": ["长度（字符）", "相似行的分组", "各行的去向", "<th>之前</th>", "读取 5 行，保留 4 行"],
}


def in_json(text: str) -> str:
    """As a picture's JSON holds it."""
    return json.dumps(text)[1:-1]


def test_the_page_says_everything_in_both_languages(source, tmp_path, language, capsys):
    report = prepare(source, tmp_path / "o", dev=0, test=0)
    page = (tmp_path / "o" / "report.html").read_text(encoding="utf-8")
    assert f'<html lang="{language}">' in page
    other = SAYS["zh" if language == "en" else "en"]
    for text in SAYS[language]:
        assert text in page or in_json(text) in page, text
    for text in other:
        assert text not in page and in_json(text) not in page, text  # noqa: PT018 - one text in two forms
    assert re.findall(r'<div id="(\w+)"', page) == ["became", "rules", "lengths", "clusters"]
    for piece in ("0。7mg", "0.7mg", "13*********", "[热线]", "self_harm", "advert", "手脚冰凉"):
        assert piece in page, piece
    print_summary(report)
    said = capsys.readouterr().out
    assert SAYS[language][-1] in said
    assert "self_harm" in said


def test_the_same_rows_give_the_same_bytes(source, tmp_path, monkeypatch):
    for name in ("o", "p"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        prepare(source, tmp_path / name)
    for file in ("report.html", "report.json", "data_card.json", "train.jsonl"):
        assert (tmp_path / "o" / file).read_bytes() == (tmp_path / "p" / file).read_bytes(), file


def test_no_path_no_network_no_script_of_a_row(source, tmp_path):
    prepare(source, tmp_path / "o", no_clean=["html_tags"])
    for file in (tmp_path / "o").rglob("*.*"):
        assert str(tmp_path) not in file.read_text(encoding="utf-8"), file.name
    page = (tmp_path / "o" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert not re.search(r"<(script|link|img)[^>]*\b(src|href)=", page)
    assert re.search(r'"showSendToCloud": ?false', page)


# ---- what it shows -------------------------------------------------------------------------------------------------


def test_lengths_by_hand():
    bars = lengths(["", "a" * (STEP - 1), "a" * STEP, "a" * LAST, "a" * 10 * LAST])
    assert (bars[0], bars[1], bars[-1], sum(bars), len(bars)) == (2, 1, 2, 5, LAST // STEP + 1)


def test_a_questions_own_answers_are_no_group():
    rows = [row(id="a"), row("别的问题", "打13812345678", id="b"), row("又一个问题", id="c"), row("问", id="d")]
    found = groups(rows, [0, 1, 1, 0])
    assert found["sizes"] == {"2": 2}
    assert [(g["questions"], g["ids"]) for g in found["largest"]] == [(2, ["a", "d"]), (2, ["b", "c"])]
    assert "13812345678" not in json.dumps(found)
    one = [row(id="a"), row("同一个问题", id="a")]
    assert groups(one, [0, 0]) == {"sizes": {"1": 1}, "largest": []}


def test_a_planted_row_unlike_the_others_is_named():
    rows = [row("问" * (20 + i % 9), "答" * (80 + i % 40), id=str(i)) for i in range(200)]
    assert outliers(rows) == {"rows": 0, "farthest": []}
    found = outliers([*rows, row("问" * 20, "答" * 3000, id="planted")])
    assert (found["rows"], found["farthest"][0]["id"]) == (1, "planted")
    assert found["farthest"][0]["answer_characters"] == 3000
    assert outliers([]) == {"rows": 0, "farthest": []}
