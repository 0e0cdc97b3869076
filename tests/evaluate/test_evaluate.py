"""Losses against plain loops, and the verdict."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lora_cmqa.core import Example, Message, TokenizedExample
from lora_cmqa.data.template import ChatTemplate, encode_all
from lora_cmqa.errors import DataError
from lora_cmqa.evaluate.bootstrap import Paired
from lora_cmqa.evaluate.forgetting import Divergence
from lora_cmqa.evaluate.measures import loss_measures
from lora_cmqa.evaluate.nll import RowLosses, last_answer, row_losses, shuffled_pairs
from lora_cmqa.evaluate.verdict import task_verdict


def example(i, question="q", answer="a"):
    return Example((Message("user", question), Message("assistant", answer)), id=str(i), question_id=question)


def test_row_losses_equal_a_plain_loop(tiny, exact_norms):
    model, tokenizer = tiny
    rows, _ = encode_all(
        [example(i % 4, f"问题{i}" * (i + 1), f"回答{i}" * (9 - i)) for i in range(9)],  # ids repeat on purpose
        ChatTemplate.from_tokenizer(tokenizer),
        max_length=512,
    )
    scored = row_losses(model, rows, max_tokens=150)
    for i, row in enumerate(rows):
        ids, labels = torch.tensor(row.input_ids).long(), torch.tensor(row.labels).long()
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0]
        want = F.cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100)
        assert scored.total[i] == pytest.approx(float(want), rel=1e-10)
        assert scored.tokens[i] == row.supervised_tokens


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30), st.integers(0, 5))
def test_no_answer_keeps_a_question_of_its_own(owners, seed):
    rows = [example(i, f"question {q}", f"answer {i} of {q}") for i, q in enumerate(owners)]
    if 2 * max(owners.count(q) for q in owners) > len(owners):
        with pytest.raises(DataError):
            shuffled_pairs(rows, seed=seed)
        return
    mixed = shuffled_pairs(rows, seed=seed)
    assert [(m.id, m.answer) for m in mixed] == [(r.id, r.answer) for r in rows]
    assert sorted(m.question for m in mixed) == sorted(r.question for r in rows)
    assert not any(m.question == f"question {q}" for m, q in zip(mixed, owners, strict=True))
    assert all(m.question_id == m.question for m in mixed)
    assert mixed == shuffled_pairs(rows, seed=seed)


def test_content_is_what_is_left_of_the_gain_without_the_style():
    """Losses that depend on the answer's length only, on both sides: nothing about any question was learned."""
    tokens = np.array([3, 40, 7, 90, 15, 60])
    base, adapter = (RowLosses(c * tokens**0.5, tokens) for c in (8.0, 5.0))
    true = Divergence(base, adapter, np.zeros(6))
    named = {m.name: m for m in loss_measures(true, (base, adapter), list("abcdef"))}
    none = named["content_gain"].paired(samples=200, seed=1)
    assert (none.base, none.adapter, none.difference, none.ci95) == (0, 0, 0, (0, 0))
    easier = RowLosses(adapter.total - 0.1 * tokens, tokens)  # after its own question each token is 0.1 nats easier
    named = {m.name: m for m in loss_measures(Divergence(base, easier, np.zeros(6)), (base, adapter), list("abcdef"))}
    assert named["content_gain"].paired(samples=200, seed=1).difference == pytest.approx(0.1)
    with pytest.raises(DataError, match="other tokens"):
        loss_measures(true, (base, RowLosses(adapter.total, tokens[::-1])), list("abcdef"))


def test_only_the_last_answer_of_a_conversation_is_scored():
    labels = np.array([-100, 1, 2, -100, -100, 5, 6, 7, -100], np.int32)
    row = TokenizedExample(np.arange(9, dtype=np.int32), labels, id="r", question_id="q")
    assert last_answer(row).labels.tolist() == [-100] * 5 + [5, 6, 7, -100]
    assert last_answer(last_answer(row)).labels.tolist() == last_answer(row).labels.tolist()


def interval(low, high):
    return Paired(1, 1, (low + high) / 2, (low, high), 0.5, 10, 0.1)


@pytest.mark.parametrize(
    ("loss", "content", "says"),
    [
        ((-1, -0.5), (0.1, 0.2), "better"),
        ((-1, -0.5), (-0.1, 0.2), "style only"),
        ((-0.1, 0.1), (-0.1, 0.2), "no difference shown"),
        ((0.1, 0.2), (-0.1, 0.2), "worse"),
        ((0.1, 0.2), (0.1, 0.2), "worse"),
    ],
)
def test_the_verdict(loss, content, says):
    assert task_verdict({"nll": interval(*loss), "content_gain": interval(*content)}) == says
