"""The numbers of a report against plain loops and against scipy."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lora_cmqa.core import Example, Message
from lora_cmqa.data.template import ChatTemplate, encode_all
from lora_cmqa.errors import DataError
from lora_cmqa.evaluate.bootstrap import Paired, paired
from lora_cmqa.evaluate.evaluation import verdict
from lora_cmqa.evaluate.nll import row_losses, shuffled_pairs
from lora_cmqa.evaluate.overlap import repetition_rate


def example(i, question="q", answer="a"):
    return Example((Message("user", question), Message("assistant", answer)), id=str(i), question_id=question)


def test_row_losses_equal_a_plain_loop(tiny):
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


def test_the_interval_is_scipys():
    generator = np.random.default_rng(5)
    base = generator.normal(3, 1, 80)
    own = base - 0.3 + generator.normal(0, 0.5, 80)
    found = paired(base, own, [str(i) for i in range(80)], samples=20_000)
    theirs = stats.bootstrap(
        ((own - base),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.ci95 == pytest.approx((theirs.low, theirs.high), abs=0.012)
    assert found.difference == pytest.approx(float((own - base).mean()))


def test_rows_of_one_question_move_together():
    """Ten copies of each row say no more than one: the interval must not shrink."""
    generator = np.random.default_rng(6)
    base, own = generator.normal(0, 1, 30), generator.normal(0.2, 1, 30)
    names = [str(i) for i in range(30)]
    once = paired(base, own, names, samples=4000)
    ten = paired(np.repeat(base, 10), np.repeat(own, 10), list(np.repeat(names, 10)), samples=4000)
    assert ten.n == once.n == 30
    assert ten.ci95 == pytest.approx(once.ci95, abs=1e-9)


def test_p_is_the_exact_sign_flip_test_where_all_signs_can_be_tried():
    difference = np.array([0.5, 1.0, -0.2, 0.7, 0.9])
    found = paired(np.zeros(5), difference, list("abcde"), samples=1000)
    signs = np.array(np.meshgrid(*[[1, -1]] * 5)).reshape(5, -1).T
    assert found.p == pytest.approx((np.abs(signs @ difference) >= difference.sum() - 1e-9).mean())


def test_nothing_gives_nothing_shown():
    values = np.random.default_rng(7).normal(0, 1, 40)
    found = paired(values, values, [str(i) for i in range(40)], samples=500)
    assert (found.difference, found.ci95, found.p) == (0, (0, 0), 1)
    assert not found.is_shown


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_noise_is_seldom_called_a_difference(seed):
    """Not a proof of 5 %, but no seed may give a tiny p where the signs are even."""
    half = np.abs(np.random.default_rng(seed).normal(0, 1, 20)) + 0.1
    found = paired(np.zeros(40), np.concatenate([half, -half]), [str(i) for i in range(40)], samples=400)
    assert found.ci95[0] < 0 < found.ci95[1]


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
    assert verdict({"nll": interval(*loss), "content_gain": interval(*content)}) == says


@pytest.mark.parametrize(("text", "rate"), [("", 0), ("头痛", 0), ("abcdefgh", 0), ("abcdabcd", 1 / 5)])
def test_repetition_rate(text, rate):
    assert repetition_rate(text) == pytest.approx(rate)


def test_a_loop_repeats_itself():
    assert repetition_rate("多喝水。" * 30) > 0.9
