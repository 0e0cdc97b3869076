"""Clusters of like rows go to one side whole."""

import random

import pytest

from lora_cmqa.data.sources import read_cmqa
from lora_cmqa.data.split import jaccard, leaks, shingles, split


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
