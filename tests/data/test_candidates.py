"""Ranking lists: the source's own are kept, a source without any gets drawn ones, and no list points at nothing."""

import json

import pytest

from lora_cmqa.core import Example, Message
from lora_cmqa.data import candidates as room
from lora_cmqa.data.candidates import draw_candidates, read_prepared_candidates
from lora_cmqa.data.prepare import load_split, prepare
from lora_cmqa.data.sources import write_messages
from lora_cmqa.data.split import clusters, jaccard, shingles
from lora_cmqa.errors import DataError
from lora_cmqa.evaluate.ranking import candidate_sets

from .conftest import cmqa, row

WORDS = ("头痛", "发烧", "咳嗽", "失眠", "胃痛", "皮疹", "乏力", "心慌", "腹泻", "便秘")


def rows(count: int) -> list[Example]:
    """Questions like no other; every fifth has a second answer, every seventh one nearly that of the row before."""
    out = []
    for i in range(count):
        q = f"{WORDS[i % 10]}第{i * 7919}天，{WORDS[i * 3 % 10]}怎么办"
        a = f"{i * 104729}号建议：{WORDS[i * 7 % 10]}先观察，{WORDS[i * i % 10]}再检查，多休息{i}天后复诊。"
        out.append(Example((Message("user", q), Message("assistant", a)), f"a{i}", f"q{i}"))
        if i % 5 == 0:
            second = Message("assistant", f"另一种看法是{WORDS[i * 3 % 10]}与{i * 15485863}有关，请到医院查。")
            out.append(Example((Message("user", q), second), f"b{i}", f"q{i}"))
    return out


def test_a_drawn_list_is_right_about_what_is_right():
    examples = rows(130)
    near = examples[3].answer.replace("多休息", "多多休息")
    examples.append(Example((Message("user", "另一个人的问题是什么"), Message("assistant", near)), "near", "qnear"))
    numbers = clusters(examples)
    assert numbers[3] == numbers[-1]
    lists = draw_candidates(examples, numbers, seed=42)
    by_id = {e.id: e for e in examples}
    assert [c.question_id for c in lists] == list(dict.fromkeys(e.question_id for e in examples))
    for c in lists:
        assert len(c.candidates) == len(set(c.candidates)) == room.CANDIDATES
        right = {a for a, y in zip(c.candidates, c.labels, strict=True) if y}
        assert right == {e.id for e in examples if e.question_id == c.question_id}
        own = [shingles(by_id[a].answer) for a in right]
        assert max(jaccard(shingles(by_id[a].answer), o) for a in set(c.candidates) - right for o in own) < 0.7
    assert lists == draw_candidates(examples, numbers, seed=42)
    assert lists != draw_candidates(examples, numbers, seed=43)
    assert len({c.labels.index(1) for c in lists}) > 30  # the right one stands anywhere


def test_no_more_lists_than_are_needed_and_none_for_conversations(monkeypatch):
    monkeypatch.setattr(room, "QUESTIONS", 7)
    examples = rows(20)
    first = examples[0]
    more = Example((*first.messages, Message("user", "还有呢"), Message("assistant", "没有了，请放心。")), "m", "qm")
    lists = draw_candidates([*examples, more], range(len(examples) + 1), seed=1)
    assert len(lists) == 7
    assert "qm" not in {c.question_id for c in lists}
    assert "m" not in {a for c in lists for a in c.candidates}


def test_a_source_without_lists_gets_them_and_the_evaluation_reads_them(tmp_path):
    write_messages(tmp_path / "in.jsonl", rows(60))
    report = prepare(tmp_path / "in.jsonl", tmp_path / "o", dev=0.2, test=0.3)
    assert report["candidates_drawn"] == ["dev", "test"]
    test = load_split(tmp_path / "o", "test")
    assert report["candidates"]["test"] == len({e.question_id for e in test})
    sets, from_file = candidate_sets(tmp_path / "o", "test", test, questions=-1, candidates=0, seed=1)
    assert from_file
    answers = {e.answer for e in test}
    assert {a for c in sets for a in c.answers} <= answers  # nothing the model was trained on
    of = {e.question_id: [x.answer for x in test if x.question_id == e.question_id] for e in test}
    assert all({a for a, y in zip(c.answers, c.labels, strict=True) if y} == set(of[c.question_id]) for c in sets)


def every_file(folder):
    return {p.name: p.read_bytes() for p in sorted((folder / "candidates").iterdir())}


@pytest.mark.parametrize("settings", [{}, {"limit": 20}, {"drop_leaks": True}])
def test_lists_are_carried_over_when_prepared_again(tmp_path, settings):
    write_messages(tmp_path / "in.jsonl", rows(60))
    prepare(tmp_path / "in.jsonl", tmp_path / "o", **settings)
    again = prepare(tmp_path / "o", tmp_path / "p")
    assert again["candidates_drawn"] == []
    assert every_file(tmp_path / "o") == every_file(tmp_path / "p")


def test_a_sources_own_lists_survive_a_limit_and_a_second_time(tmp_path):
    questions = "".join(f"{i},{WORDS[i]}第{i * 7919}天怎么办\n" for i in range(10))
    answers = "".join(f"{i},{i},{WORDS[i]}要{WORDS[i * 3 % 10]}地休息{i * 977}天。\n" for i in range(10))
    folder = cmqa(tmp_path / "d", f"question_id,content\n{questions}", f"ans_id,question_id,content\n{answers}")
    for split, q in (("dev", 8), ("test", 9)):
        lines = "".join(f"{q},{a},0,{int(a == q)}\n" for a in range(10))
        (folder / f"{split}_candidates.txt").write_text(f"question_id,ans_id,cnt,label\n{lines}")
    lines = "".join(f"{q},{q},{(q + 1) % 8}\n" for q in range(8))
    (folder / "train_candidates.txt").write_text(f"question_id,pos_ans_id,neg_ans_id\n{lines}")
    report = prepare(folder, tmp_path / "o", limit=2)
    assert (report["candidates"], report["candidates_drawn"]) == ({"train": 2, "dev": 1, "test": 1}, [])
    (of_test,) = read_prepared_candidates(tmp_path / "o" / "candidates").lists["test"]
    assert of_test.candidates == tuple(str(a) for a in range(10))  # also answers that the limit left out of train
    prepare(tmp_path / "o", tmp_path / "p")
    assert every_file(tmp_path / "o") == every_file(tmp_path / "p")


def test_a_rejected_answer_leaves_every_list_and_old_lists_go(tmp_path):
    folder = cmqa(
        tmp_path / "d",
        "question_id,content\n1,头痛怎么办\n2,发烧怎么办\n3,咳嗽怎么办\n",
        "ans_id,question_id,content\n1,1,建议休息观察。\n2,2,请多喝温水。\n3,3,好\n",
    )
    (folder / "test_candidates.txt").write_text("question_id,ans_id,cnt,label\n2,2,0,1\n2,1,0,0\n2,3,0,0\n3,3,0,1\n")
    prepare(folder, tmp_path / "o")
    found = read_prepared_candidates(tmp_path / "o" / "candidates")
    assert [(c.question_id, c.candidates, c.labels) for c in found.lists["test"]] == [("2", ("2", "1"), (1, 0))]
    assert set(found.texts) == {"1", "2"}
    write_messages(tmp_path / "in.jsonl", [row(id="1"), row("第二个问题", "第二种回答在此。", id="2")])
    prepare(tmp_path / "in.jsonl", tmp_path / "o", dev=0, test=0)
    assert every_file(tmp_path / "o") == {}


def test_a_damaged_list_is_named(tmp_path):
    write_messages(tmp_path / "in.jsonl", rows(60))
    prepare(tmp_path / "in.jsonl", tmp_path / "o")
    file = tmp_path / "o" / "candidates" / "test.jsonl"
    file.write_text(json.dumps({"question_id": "1"}) + "\n")
    with pytest.raises(DataError, match=r"test.jsonl: not a ranking list"):
        prepare(tmp_path / "o", tmp_path / "p")
