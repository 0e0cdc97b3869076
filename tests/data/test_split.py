"""Clusters of like rows go to one side whole."""

import random

import pytest

from lora_cmqa.data.sources import read_cmqa
from lora_cmqa.data.split import jaccard, leaking, leaks, near_pairs, shingles, split
from lora_cmqa.errors import ConfigError

from .conftest import row


def test_a_naive_split_leaks_and_ours_does_not(cmqa_mini):
    rows, _ = read_cmqa(cmqa_mini)
    shuffled = rows.copy()
    random.Random(0).shuffle(shuffled)
    naive = leaks(shuffled[:500], shuffled[500:])
    assert 0.03 < naive.questions / naive.of_questions < 0.09
    ours = split(rows, dev=0.1, test=0.1, seed=1)
    sides = {s: [e for e in ours if e.split == s] for s in ("train", "dev", "test")}
    assert all(len(sides[s]) > 400 for s in sides)
    for a, b in (("test", "train"), ("dev", "train"), ("test", "dev")):
        found = leaks(sides[a], sides[b])
        assert (found.questions, found.answers) == (0, 0)


def test_jaccard_by_hand():
    assert jaccard(shingles("abcdef"), shingles("abcdeg")) == pytest.approx(1 / 3)


def edited(rng: random.Random, text: str, edits: int) -> str:
    letters = list(text)
    for _ in range(edits):
        letters[rng.randrange(len(letters))] = rng.choice("甲乙丙丁戊己庚辛")
    return "".join(letters)


def test_near_pairs_are_those_of_the_plain_loop():
    """MinHash only proposes: what it finds is exactly what comparing every pair finds."""
    rng = random.Random(5)
    first = ["".join(rng.choice("的一是在有人不了中大为上个国我以要他时来用们") for _ in range(60)) for _ in range(60)]
    texts = first + [edited(rng, rng.choice(first), rng.randint(0, 6)) for _ in range(240)]
    grams = [shingles(t) for t in texts]
    plain = {(i, j) for j in range(len(texts)) for i in range(j) if jaccard(grams[i], grams[j]) >= 0.7}
    distinct = {(texts[i], texts[j]) for i, j in plain if texts[i] != texts[j]}
    found = {(texts[i], texts[j]) for i, j in near_pairs(texts, 0.7)}
    assert len(distinct) > 50
    assert {frozenset(p) for p in found if p[0] != p[1]} == {frozenset(p) for p in distinct}


def test_leaks_count_questions_once_and_answers_by_row():
    one = [row("孩子发烧怎么办呢", "建议多喝水，注意休息。", id=i) for i in "ab"] + [row("别的问题是什么", id="c")]
    other = [row("孩子发烧怎么办呢？", "建议多喝水，注意休息。", id="d")]
    found = leaks(one, other)
    assert (found.questions, found.of_questions, found.answers, found.of_answers) == (1, 2, 2, 3)
    assert leaking(one, other) == [True, True, False]


def test_named_rows_keep_their_side_and_pull_their_cluster():
    rows = [
        row("孩子发烧怎么办呢", "建议多喝水，注意休息。", id="1", split="test"),
        row("另一个人的问题", "建议多喝水，注意休息。", id="2"),
        *(row(f"{i * 7919}号病人的问题是什么", f"{i * 104729}号回答", id=str(i)) for i in range(3, 23)),
    ]
    sides = [e.split for e in split(rows, dev=0, test=0)]
    assert sides[:2] == ["test", "test"]
    assert set(sides[2:]) == {"train"}
    assert split(rows, dev=0.2, test=0.2, seed=3) == split(rows, dev=0.2, test=0.2, seed=3)
    assert split(rows, dev=0.2, test=0.2, seed=3) != split(rows, dev=0.2, test=0.2, seed=4)


def test_shares_that_leave_nothing_are_refused():
    for dev, test in ((0.5, 0.5), (-0.1, 0), (0, 1)):
        with pytest.raises(ConfigError, match="shares"):
            split([row()], dev=dev, test=test)
