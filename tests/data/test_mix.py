"""Several sources with weights: each row accounted for in its source, copies counted apart."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cmqa.data.mix import draw, is_copy, read_parts, read_sources, repeat
from lora_cmqa.data.prepare import load_split, prepare
from lora_cmqa.data.sources import read_messages, write_messages
from lora_cmqa.errors import DataError

from .conftest import cmqa, row

WORDS = ("头痛", "发烧", "咳嗽", "失眠", "胃痛", "皮疹", "乏力", "心慌", "腹泻", "便秘")


def rows_about(place: str, count: int) -> list:
    """Rows like no other."""
    asked = [f"{place}{WORDS[i % 10]}第{i * 7919}天，{WORDS[i * 3 % 10]}怎么办" for i in range(count)]
    return [row(q, f"{WORDS[i * 7 % 10]}{place}休息{i}天。", id=str(i)) for i, q in enumerate(asked)]


@pytest.fixture
def mixed(tmp_path):
    """A YAML file of three sources whose ids are the same."""
    write_messages(tmp_path / "a.jsonl", rows_about("甲地的", 40))
    write_messages(tmp_path / "b.jsonl", rows_about("乙地的", 30))
    (tmp_path / "c").mkdir()
    cmqa(tmp_path / "c")
    file = tmp_path / "mix.yaml"
    file.write_text(
        "sources:\n- path: a.jsonl\n  weight: 0.5\n- {path: b.jsonl, name: clinic, weight: 2.5}\n- path: c\n",
        encoding="utf-8",
    )
    return file


def test_each_source_has_its_account(mixed, tmp_path):
    report = prepare(mixed, tmp_path / "o", dev=0.1, test=0.1)
    a, clinic, c = report["sources"]
    assert [s["name"] for s in report["sources"]] == ["a", "clinic", "c"]
    for s in (a, clinic, c):
        assert s["read"] == s["kept"] + s["rejected"]
    train = read_messages(tmp_path / "o" / "train.jsonl")
    written = Counter(e.id.split(":")[0] for e in train)
    held_out = Counter(e.id.split(":")[0] for s in ("dev", "test") for e in load_split(tmp_path / "o", s))
    assert a["read"] == 40
    assert written["a"] == a["kept"] - held_out["a"] == round(0.5 * (40 - held_out["a"]))
    assert report["reasons"] == {"weight": 40 - held_out["a"] - written["a"]}
    of_clinic = 30 - held_out["clinic"]
    assert (clinic["kept"], clinic["rejected"]) == (30, 0)
    assert written["clinic"] == of_clinic + clinic["repeated"] == 2 * of_clinic + round(0.5 * of_clinic)
    assert report["repeated"] == clinic["repeated"]
    assert sum(report["splits"].values()) == report["kept"] + report["repeated"]
    assert not [e for s in ("dev", "test") for e in load_split(tmp_path / "o", s) if "#" in e.id]


def test_copies_are_no_duplicates_when_prepared_again(mixed, tmp_path):
    prepare(mixed, tmp_path / "o")
    again = prepare(tmp_path / "o", tmp_path / "p")
    assert (again["rejected"], again["repaired"]) == (0, 0)
    for name in ("train", "dev", "test"):
        assert (tmp_path / "o" / f"{name}.jsonl").read_bytes() == (tmp_path / "p" / f"{name}.jsonl").read_bytes()


def test_a_limit_cuts_copies_first_counted_rows_never_vanish(mixed, tmp_path):
    report = prepare(mixed, tmp_path / "o", limit=20)
    assert report["splits"]["train"] == 20
    assert report["read"] == report["kept"] + report["rejected"] == 71
    assert set(report["reasons"]) == {"weight", "limit"}


def test_the_picture_of_draw():
    by_weight, by_limit = draw([0, 0, 1, 1, 1], [2.5, 0.6], limit=None, seed=1)
    assert by_weight == by_limit
    assert sorted(by_weight[:2]) == [2, 3]
    assert sorted(by_weight[2:]) == [0, 1, 1]
    assert sum(draw([0, 0, 1, 1, 1], [2.5, 0.6], limit=4, seed=1)[1]) == 4


@given(st.lists(st.integers(0, 2), max_size=30), st.none() | st.integers(1, 40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_draw_writes_what_weights_and_limit_say(source_of, limit, seed):
    weights = [0.3, 1.0, 2.7]
    by_weight, by_limit = draw(source_of, weights, limit=limit, seed=seed)
    for i, w in enumerate(weights):
        mine = [n for n, s in zip(by_weight, source_of, strict=True) if s == i]
        assert sum(mine) == int(w) * len(mine) + round((w - int(w)) * len(mine))
    assert sum(by_limit) == min(sum(by_weight), limit or 10**9)
    assert all(b <= a for a, b in zip(by_weight, by_limit, strict=True))


def test_repeat_names_copies_that_is_copy_knows():
    ids = [e.id for e in repeat([row(id="a"), row(id="b"), row(id="c")], [3, 0, 1])]
    assert ids == ["a", "c", "a#2", "a#3"]
    assert is_copy("a#2", of="a")
    assert not is_copy("a#2", of="b")
    assert not is_copy("a#x", of="a")
    assert not is_copy("a", of="a")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- path: a", "a list under `sources:`"),
        ("sources: []", "a list under `sources:`"),
        ("sources: [{path: a}]\nmore: 1", "and nothing else"),
        ("sources: [3]", r"sources\[1\].*with a `path:`"),
        ("sources: [{path: a, wieght: 2}]", "Did you mean weight"),
        ("sources: [{path: a, weight: 0}]", "weight 0 must"),
        ("sources: [{path: a, weight: '2'}]", "weight '2' must"),
        ("sources: [{path: a, weight: .nan}]", "weight nan must"),
        ("sources: [{path: x/a.csv}, {path: y/a.json}]", "two sources are called 'a'"),
        ("sources: [{path: a, name: 'b:c'}]", "holds a colon"),
        ("sources: [", "not a readable YAML file"),
    ],
)
def test_a_bad_file_of_sources_is_named(tmp_path, text, says):
    (tmp_path / "m.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=f"(?s){says}"):
        read_parts(tmp_path / "m.yaml")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_sources(tmp_path / "m.yaml")
    (tmp_path / "m.yaml").write_text("sources: [{path: nowhere.csv}]")
    with pytest.raises(DataError, match=r"nowhere.csv: no such file or folder"):
        read_sources(tmp_path / "m.yaml")
