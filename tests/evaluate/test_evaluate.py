"""Losses against plain loops, and the verdict."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from lora_cmqa.core import Example, Message
from lora_cmqa.data.template import ChatTemplate, encode_all
from lora_cmqa.errors import DataError
from lora_cmqa.evaluate.bootstrap import Paired
from lora_cmqa.evaluate.nll import row_losses, shuffled_pairs
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
def test_no_question_keeps_an_answer_of_its_own(owners, seed):
    rows = [example(i, f"question {q}", f"answer {i} of {q}") for i, q in enumerate(owners)]
    if 2 * max(owners.count(q) for q in owners) > len(owners):
        with pytest.raises(DataError):
            shuffled_pairs(rows, seed=seed)
        return
    mixed = shuffled_pairs(rows, seed=seed)
    assert [m.question for m in mixed] == [r.question for r in rows]
    assert sorted(m.answer for m in mixed) == sorted(r.answer for r in rows)
    assert not any(m.answer.endswith(f"of {q}") for m, q in zip(mixed, owners, strict=True))
    assert mixed == shuffled_pairs(rows, seed=seed)


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
