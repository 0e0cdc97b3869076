"""Ranks against hand-made scores, scores against a plain loop, candidate lists as `cmqa prepare` leaves them."""

import json

import numpy as np
import pytest
import torch

from lora_cmqa.core import Example, Message
from lora_cmqa.data.prepare import load_split, prepare
from lora_cmqa.data.template import ChatTemplate
from lora_cmqa.errors import DataError
from lora_cmqa.evaluate.ranking import (
    CandidateSet,
    answer_log_probs,
    answer_log_probs_plain,
    candidate_sets,
    encode_answers,
    prompt_ids,
    rank_answers,
    rank_of_right,
)
from lora_cmqa.lora.inject import inject_lora, lora_parameters
from lora_cmqa.models.tiny import KINDS, byte_tokenizer, tiny_model


def adapted(kind, dtype):
    model = inject_lora(tiny_model(kind, dtype), r=4, lora_alpha=8, seed=1).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in lora_parameters(model).values():
            weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
    return model


@pytest.fixture(scope="module")
def template():
    return ChatTemplate.from_tokenizer(byte_tokenizer())


ANSWERS = [np.array(a, dtype=np.int32) for a in ([7, 8, 9, 258], [258], list(range(40, 100)), [1, 2], [7, 8, 9, 258])]
LENGTHS = np.array([len(a) for a in ANSWERS])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("prefix", [5, 60])  # 60: longer than the tiny Gemma's window of 16
def test_scores_are_those_of_a_plain_loop(kind, dtype, close, prefix):
    model = adapted(kind, dtype)
    before = np.random.default_rng(prefix).integers(0, 256, prefix).tolist()
    for max_tokens in (4096, 64):
        found = answer_log_probs(model, before, ANSWERS, max_tokens=max_tokens)
        want = answer_log_probs_plain(model, before, ANSWERS)
        assert found / LENGTHS == pytest.approx(want / LENGTHS, abs=close)  # nats per token
    with model.disable_adapter():
        bare = answer_log_probs(model, before, ANSWERS)
        assert bare / LENGTHS == pytest.approx(answer_log_probs_plain(model, before, ANSWERS) / LENGTHS, abs=close)
    assert np.abs(bare - found).max() > 0.01


@pytest.mark.parametrize(
    ("scores", "labels", "rank"),
    [
        ([0.1, 0.5, 0.3], [0, 1, 0], 1),
        ([0.1, 0.2, 0.3], [1, 0, 0], 3),
        ([0.1, 0.2, 0.3, 0.4], [1, 0, 1, 0], 2),  # the better of two right ones counts
        ([0.1, 0.9, 0.8], [0, 1, 1], 1),  # another right one in front takes nothing away
        ([0.5, 0.5], [1, 0], 2),  # a tie is not found
    ],
)
def test_rank_of_the_best_right_answer(scores, labels, rank):
    assert rank_of_right(np.array(scores), np.array(labels, dtype=bool)) == rank


def test_ranks_by_length_and_by_pmi_equal_a_plain_loop(template):
    model = adapted("qwen2", torch.float64)
    sets = [
        CandidateSet(
            f"q{i}", f"问题{i}？", tuple(f"回答{j}" * (1 + j) for j in range(4)), (i == 0, i == 1, i == 2, False)
        )
        for i in range(3)
    ]
    found = rank_answers(model, sets, template, system="你是医生")
    ids = encode_answers(sets[0].answers, template)
    rows = [ids[a] for a in sets[0].answers]
    alone = answer_log_probs_plain(model, prompt_ids("", template, "你是医生"), rows)
    for i, c in enumerate(sets):
        scores = answer_log_probs_plain(model, prompt_ids(c.question, template, "你是医生"), rows)
        assert found.by_length[i] == rank_of_right(scores / [len(r) for r in rows], np.array(c.labels))
        assert found.by_pmi[i] == rank_of_right(scores - alone, np.array(c.labels))
    assert len(rank_answers(model, sets, template, pmi=False).by_pmi) == 0


def test_an_answer_is_the_ids_that_training_teaches(template):
    ids = encode_answers(["头痛", "多休息。", "头痛"], template)
    assert list(ids) == ["头痛", "多休息。"]
    assert ids["头痛"].tolist() == [*"头痛".encode(), 258]
    assert encode_answers(["头痛"], template, 2)["头痛"].tolist() == list("头痛".encode()[:2])
    with pytest.raises(DataError, match="without text"):
        encode_answers(["  "], template)


# ---- candidate lists -----------------------------------------------------------------------------------------------


def row(i, question, answer):
    return Example((Message("user", question), Message("assistant", answer)), id=str(i), question_id=question)


ROWS = [row(i, f"q{i % 5}", f"a{i}") for i in range(7)]  # q0 and q1 have two answers


def test_without_a_file_the_others_answers_are_the_wrong_ones(tmp_path):
    sets, from_file = candidate_sets(tmp_path, "test", ROWS, questions=-1, candidates=0, seed=1)
    assert not from_file
    assert [c.question_id for c in sets] == ["q0", "q1", "q2", "q3", "q4"]
    assert sets[0].answers == tuple(f"a{i}" for i in range(7))
    assert sets[0].labels == (True, False, False, False, False, True, False)
    few, _ = candidate_sets(tmp_path, "test", ROWS, questions=3, candidates=4, seed=1)
    assert len(few) == 3
    assert all(len(c.answers) == 4 for c in few)
    assert sum(few[0].labels) == (2 if few[0].question_id in ("q0", "q1") else 1)
    assert few == candidate_sets(tmp_path, "test", ROWS, questions=3, candidates=4, seed=1)[0]
    assert candidate_sets(tmp_path, "test", ROWS[:1], questions=-1, candidates=0, seed=1) == ([], False)


def test_the_samples_own_lists_are_read(tmp_path):
    from lora_cmqa.demo import SAMPLE

    prepare(SAMPLE, tmp_path)
    examples = load_split(tmp_path, "test")
    sets, from_file = candidate_sets(tmp_path, "test", examples, questions=10, candidates=8, seed=1)
    assert from_file
    assert len(sets) == 10
    own = {e.question_id: [x.answer for x in examples if x.question_id == e.question_id] for e in examples}
    for c in sets:
        assert len(c.answers) == 8
        right = {a for a, y in zip(c.answers, c.labels, strict=True) if y}
        assert right & set(own[c.question_id])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not a line of JSON"),
        ('{"question_id": "q0"}', "candidates"),
        ('{"question_id": "q0", "question": "q0", "candidates": ["9"], "labels": [1]}', "not in answers.jsonl"),
        ('{"question_id": "q0", "question": "q0", "candidates": ["1"], "labels": [0]}', "0 of them right"),
    ],
)
def test_a_broken_list_is_named(tmp_path, line, says):
    (tmp_path / "candidates").mkdir()
    (tmp_path / "candidates/answers.jsonl").write_text(json.dumps({"ans_id": "1", "content": "a"}) + "\n")
    (tmp_path / "candidates/test.jsonl").write_text(line + "\n")
    with pytest.raises(DataError) as e:
        candidate_sets(tmp_path, "test", ROWS, questions=-1, candidates=0, seed=1)
    assert says in str(e.value)
    assert "line 1" in str(e.value)
