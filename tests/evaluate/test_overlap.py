"""Scores of answers against hand-made cases and the libraries' own corpus scores."""

import math

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from lora_cmqa.evaluate.overlap import (
    SENTENCE_SCORES,
    bleu_of_sums,
    bleu_sums,
    copies_question,
    distinct,
    repetition_rate,
    sentence_scores,
    signature,
    words,
)

ANSWERS = ["您好，头痛要多休息，多喝水。", "建议去医院检查。", ""]
REFERENCES = [["头痛要多休息。", "您好，多喝水，多休息。"], ["建议尽快去医院做检查。"], ["不严重。"]]


def test_sums_of_rows_are_sacrebleus_corpus_score():
    sums = np.stack([bleu_sums(a, r) for a, r in zip(ANSWERS, REFERENCES, strict=True)])
    streams = [[r[0] for r in REFERENCES], [r[1] if len(r) > 1 else None for r in REFERENCES]]
    assert bleu_of_sums(sums.sum(0, keepdims=True))[0] == pytest.approx(
        BLEU(tokenize="zh").corpus_score(ANSWERS, streams).score
    )


def test_llama_factorys_bleu_by_hand():
    """abcx against abcd: 1- to 4-gram precisions 3/4, 2/3, 1/2, 0/1; NIST puts 1/2 of 1/1 for the first zero."""
    found = sentence_scores("abcx", ["abcd"])["bleu_llama_factory"]
    assert found == pytest.approx(100 * (3 / 4 * 2 / 3 * 1 / 2 * 1 / 2) ** 0.25)
    short = sentence_scores("abcd", ["abcdef"])["bleu_llama_factory"]
    assert short == pytest.approx(100 * math.exp(1 - 6 / 4))


def test_the_best_reference_counts():
    both = sentence_scores(ANSWERS[0], REFERENCES[0])
    alone = [sentence_scores(ANSWERS[0], [r]) for r in REFERENCES[0]]
    for name in SENTENCE_SCORES:
        assert both[name] == pytest.approx(max(a[name] for a in alone)), name


def test_the_same_text_scores_100_and_silence_0():
    assert sentence_scores("头痛要多休息，多喝水。", ["头痛要多休息，多喝水。"]) == pytest.approx(
        dict.fromkeys(SENTENCE_SCORES, 100), abs=1e-4
    )
    assert sentence_scores("", ["头痛"]) == dict.fromkeys(SENTENCE_SCORES, 0)
    assert sentence_scores("   ", ["头痛"])["rouge_l"] == 0


def test_a_long_loop_does_not_end_the_report():
    """rouge-chinese recurses once a word."""
    assert sentence_scores("多喝水，" * 700, ["多喝水，" * 200])["rouge_1"] > 0


@pytest.mark.parametrize(
    ("question", "answer", "copied"),
    [
        ("头痛三天了怎么办？", "头痛三天了怎么办？头痛三天了怎么办？", True),
        ("头痛三天了怎么办？", "您好，头痛要休息。", False),
        ("What helps a sore throat?", "What helps a  sore throat? Warm tea.", True),
        ("痛？", "痛", False),
    ],
)
def test_a_copied_question_is_seen(question, answer, copied):
    assert copies_question(question, answer) is copied


def test_distinct_counts_words():
    assert words("头痛 要休息") == ["头痛", "要", "休息"]
    assert distinct("warm tea warm tea", 1) == 0.5
    assert distinct("warm tea warm tea", 2) == pytest.approx(2 / 3)
    assert distinct("水", 2) == 0


@pytest.mark.parametrize(("text", "rate"), [("", 0), ("头痛", 0), ("abcdefgh", 0), ("abcdabcd", 1 / 5)])
def test_repetition_rate(text, rate):
    assert repetition_rate(text) == pytest.approx(rate)


def test_a_loop_repeats_itself():
    assert repetition_rate("多喝水。" * 30) > 0.9


def test_the_signature_names_the_dictionary():
    found = signature()
    assert len(found["dictionary_sha256"]) == 64
    assert "tok:zh" in found["bleu"]
    assert found == signature()
