"""The embedded sample keeps what its README promises."""

import csv
import re
from collections import Counter
from importlib.resources import files

from lora_cmqa.data.candidates import read_candidates
from lora_cmqa.data.sources import read_cmqa, read_messages, read_splits
from lora_cmqa.data.split import jaccard, shingles
from lora_cmqa.demo import QUESTIONS, SAMPLE

SEE_A_DOCTOR = "如症状加重或没有好转，请及时到医院就诊。"


def answers():
    return [e.answer for e in read_cmqa(SAMPLE)[0]]


def test_enough_rows_over_enough_departments():
    with (SAMPLE / "questions.csv").open(encoding="utf-8") as f:
        departments = Counter(row["department"] for row in csv.DictReader(f))
    assert len(departments) >= 12
    assert len(answers()) >= 400
    several = Counter(e.question_id for e in read_cmqa(SAMPLE)[0])
    assert {1, 2, 3} <= set(several.values())


def test_no_sentence_is_repeated_but_the_one_that_sends_to_a_doctor():
    seen = Counter(s for a in answers() for s in set(re.split(r"(?<=[。！？])", a)) if len(s) >= 12)
    del seen[SEE_A_DOCTOR]
    assert max(seen.values()) <= 3


def test_no_two_answers_are_alike():
    grams = [shingles(a.replace(SEE_A_DOCTOR, "")) for a in answers()]
    assert max(jaccard(a, b) for i, a in enumerate(grams) for b in grams[:i]) < 0.5


def test_no_dose_no_number_to_call_but_120():
    for a in answers():
        assert not re.search(r"\d+\s*(?:毫克|mg|片|粒|ml|毫升)\b", a)
        assert not re.search(r"\d{7,}", a)


def test_every_answer_sends_to_a_doctor_or_to_an_emergency_room():
    for a in answers():
        assert SEE_A_DOCTOR in a or re.search(r"急诊|120|医院|就医", a), a


def test_splits_and_candidates_fit():
    splits = read_splits(SAMPLE)
    for split in ("dev", "test"):
        lists = read_candidates(SAMPLE, split)
        assert {c.question_id for c in lists} == {q for q, s in splits.items() if s == split}
        assert all(len(c.candidates) == 20 and sum(c.labels) >= 1 for c in lists)


def test_the_demo_questions_are_not_in_it():
    general = [e.question for e in read_messages(SAMPLE / "general.jsonl")]
    assert len(general) >= 60
    asked = {e.question for e in read_cmqa(SAMPLE)[0]} | set(general)
    assert not asked & set(QUESTIONS)


def test_it_says_what_it_is():
    text = files("lora_cmqa.data").joinpath("sample", "README.md").read_text(encoding="utf-8")
    assert "no medical advice" in text
    assert "written for this project" in text
