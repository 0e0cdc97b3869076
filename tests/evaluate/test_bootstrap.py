"""Intervals against scipy's, p-values against statsmodels and against all permutations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar

from lora_cmqa.errors import DataError
from lora_cmqa.evaluate.bootstrap import paired, paired_sums, ratio
from lora_cmqa.evaluate.overlap import bleu_of_sums, bleu_sums


def names(count):
    return [str(i) for i in range(count)]


def test_the_interval_is_scipys():
    generator = np.random.default_rng(5)
    base = generator.normal(3, 1, 80)
    own = base - 0.3 + generator.normal(0, 0.5, 80)
    found = paired(base, own, names(80), samples=20_000)
    theirs = stats.bootstrap(
        ((own - base),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    )
    assert found.ci95 == pytest.approx(tuple(theirs.confidence_interval), abs=0.012)
    assert found.difference == pytest.approx(float((own - base).mean()))
    assert found.detectable == pytest.approx((1.959964 + 0.841621) * theirs.standard_error, rel=0.03)


def test_the_interval_of_a_ratio_is_scipys():
    """Loss per token: questions with more tokens weigh more, and both sums are drawn together."""
    generator = np.random.default_rng(8)
    tokens = generator.integers(5, 200, 60).astype(float)
    base = generator.normal(4, 1, 60)
    own = base + generator.normal(-0.2, 0.4, 60)
    found = paired(base, own, names(60), weights=tokens, samples=20_000)

    def difference(b, o, w, axis):
        return ((o - b) * w).sum(axis) / w.sum(axis)

    theirs = stats.bootstrap(
        (base, own, tokens),
        difference,
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert found.ci95 == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_rows_of_one_question_move_together():
    """Ten copies of each row say no more than one: the interval must not shrink."""
    generator = np.random.default_rng(6)
    base, own = generator.normal(0, 1, 30), generator.normal(0.2, 1, 30)
    once = paired(base, own, names(30), samples=4000)
    ten = paired(np.repeat(base, 10), np.repeat(own, 10), list(np.repeat(names(30), 10)), samples=4000)
    assert ten.n == once.n == 30
    assert ten.ci95 == pytest.approx(once.ci95, abs=1e-9)


def test_p_is_the_exact_permutation_test_where_all_swaps_can_be_tried():
    difference = np.array([0.5, 1.0, -0.2, 0.7, 0.9])
    found = paired(np.zeros(5), difference, list("abcde"), samples=1000)
    theirs = stats.permutation_test(
        (difference,), np.sum, permutation_type="samples", alternative="two-sided", n_resamples=np.inf
    )
    assert found.p == pytest.approx(theirs.pvalue)
    assert found.test == "permutation"


@pytest.mark.parametrize(("gained", "lost", "kept"), [(9, 2, 20), (0, 6, 4), (3, 3, 1), (1, 0, 5)])
def test_yes_and_no_take_the_exact_mcnemar_test_of_statsmodels(gained, lost, kept):
    base = np.array([False] * gained + [True] * lost + [True] * kept)
    own = np.array([True] * gained + [False] * lost + [True] * kept)
    found = paired(base, own, names(len(base)), samples=500)
    assert found.p == pytest.approx(mcnemar([[kept, lost], [gained, 0]], exact=True).pvalue)
    assert found.test == "mcnemar"
    assert found.detectable >= 6 / len(base)


def test_the_permutation_test_of_yes_and_no_is_mcnemars():
    """So a question with several rows, where McNemar's test may not be used, gets the same kind of answer."""
    base, own = np.array([0, 0, 0, 0, 0, 1, 1, 0.0]), np.array([1, 1, 1, 1, 1, 0, 1, 0.0])
    exact = paired(base, own, names(8), samples=1000).p
    assert exact == pytest.approx(paired(base.astype(bool), own.astype(bool), names(8), samples=10).p)
    twice = paired(np.repeat(base, 2).astype(bool), np.repeat(own, 2).astype(bool), list(np.repeat(names(8), 2)))
    assert twice.test == "permutation"
    assert twice.p == pytest.approx(exact)


def test_corpus_bleu_is_bootstrapped_as_a_whole():
    references = [f"第{i}天头痛要多休息，必要时去医院检查。" for i in range(24)]
    base = np.stack([bleu_sums(r[: 4 + i % 5], [r]) for i, r in enumerate(references)])
    own = np.stack([bleu_sums(r[3:], [r]) for r in references])
    found = paired_sums(base, own, names(24), statistic=bleu_of_sums, samples=400)
    assert found.adapter == pytest.approx(bleu_of_sums(own.sum(0, keepdims=True))[0])
    assert found.ci95[0] > 0
    assert found.p == pytest.approx(1 / 401)


def test_nothing_gives_nothing_shown():
    values = np.random.default_rng(7).normal(0, 1, 40)
    found = paired(values, values, names(40), samples=500)
    assert (found.difference, found.ci95, found.p, found.detectable) == (0, (0, 0), 1, None)
    assert not found.is_shown
    said = paired(values > 0, values > 0, names(40), samples=500)
    assert (said.p, said.detectable) == (1, 6 / 40)  # never 0: six changes were needed


@settings(max_examples=20)
@given(st.integers(0, 1000))
def test_noise_is_seldom_called_a_difference(seed):
    """Not a proof of 5 %, but no seed may give a tiny p where the signs are even."""
    half = np.abs(np.random.default_rng(seed).normal(0, 1, 20)) + 0.1
    found = paired(np.zeros(40), np.concatenate([half, -half]), names(40), samples=400)
    assert found.ci95[0] < 0 < found.ci95[1]


def test_one_question_is_refused():
    with pytest.raises(DataError, match="at least two questions"):
        paired(np.zeros(3), np.ones(3), ["a", "a", "a"])


def test_ratio():
    assert ratio(np.array([[6.0, 3.0], [1.0, 4.0]])) == pytest.approx([2, 0.25])
