"""Paired differences with intervals.

    rows of base, rows of adapter -> sums per question -> difference of one statistic -> interval, p, detectable

Rows of one question are not independent, so whole questions are drawn: the cluster bootstrap (Miller 2024, "Adding
Error Bars to Evals", section 2.2; Efron & Tibshirani 1993, chapter 8). p is the exact McNemar test where each question
gave one yes or no (McNemar 1947; the binomial form), else a permutation test that swaps base and adapter question by
question (the approximate randomisation of Noreen 1989, exact where all swaps can be tried).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..errors import DataError

_BLOCK = 256  # bootstrap samples drawn at once: bounds the memory
_TWO_SIDED, _POWER = 1.959964, 0.841621  # normal quantiles of 97.5 % and 80 %
_FEWEST = 6  # exact McNemar: five questions that all changed one way still give p = 0.0625

Statistic = Callable[[np.ndarray], np.ndarray]  # sums [draws, k] -> values [draws]


@dataclass(frozen=True, slots=True)
class Paired:
    """One row of a report. `difference` is adapter - base."""

    base: float
    adapter: float
    difference: float
    ci95: tuple[float, float]
    p: float
    n: int  # questions
    detectable: float | None  # smallest difference found with 80 % power at the 5 % level; None: no question differs
    test: Literal["mcnemar", "permutation"] = "permutation"

    @property
    def is_shown(self) -> bool:
        """The interval excludes zero."""
        return self.ci95[0] > 0 or self.ci95[1] < 0


def ratio(sums: np.ndarray) -> np.ndarray:
    """[draws, 2] -> sum of weight x value / sum of weights, [draws]."""
    return sums[:, 0] / sums[:, 1]


def paired(
    base: np.ndarray,
    adapter: np.ndarray,
    clusters: Sequence[str],
    *,
    weights: np.ndarray | None = None,
    statistic: Statistic = ratio,
    samples: int = 10_000,
    seed: int = 42,
) -> Paired:
    """Compare two values a row, float [rows]; bool [rows] are yes and no, and take McNemar's test.

    `clusters` names each row's question; `weights` [rows] makes the mean a ratio (sum of weight x value / sum of
    weights: loss per token), default 1.
    Raises DataError for fewer than two clusters.
    """
    w = np.ones(len(base)) if weights is None else np.asarray(weights, dtype=np.float64)
    left, right = (np.stack([w * np.asarray(side, dtype=np.float64), w], axis=1) for side in (base, adapter))
    found = paired_sums(left, right, clusters, statistic=statistic, samples=samples, seed=seed)
    if base.dtype != np.bool_ or weights is not None or found.n != len(base):
        return found
    detectable = max(found.detectable or 0.0, _FEWEST / found.n)
    return replace(found, p=mcnemar_p(base, adapter), detectable=detectable, test="mcnemar")


def paired_sums(
    base: np.ndarray,
    adapter: np.ndarray,
    clusters: Sequence[str],
    *,
    statistic: Statistic,
    samples: int = 10_000,
    seed: int = 42,
) -> Paired:
    """Compare a statistic of sums over rows: base and adapter float [rows, k], as corpus BLEU of its n-gram counts.

    Raises DataError for fewer than two clusters.
    """
    names = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    if len(names) < 2:
        raise DataError(f"{len(base)} rows of {len(names)} question: an interval needs at least two questions")
    index = np.array([names[c] for c in clusters])
    ours, theirs = (_by_cluster(side, index, len(names)) for side in (adapter, base))
    left, right = (float(statistic(side.sum(0, keepdims=True))[0]) for side in (theirs, ours))
    draws = _bootstrap(theirs, ours, statistic, samples, seed)
    low, high = np.quantile(draws, (0.025, 0.975))
    spread = float(draws.std(ddof=1))
    return Paired(
        base=left,
        adapter=right,
        difference=right - left,
        ci95=(float(low), float(high)),
        p=_permutation_p(theirs, ours, statistic, samples, seed),
        n=len(names),
        detectable=(_TWO_SIDED + _POWER) * spread if spread > 0 else None,
    )


def mcnemar_p(base: np.ndarray, adapter: np.ndarray) -> float:
    """Exact and two-sided, of bool [questions]: could the questions that changed have changed either way?"""
    from scipy.stats import binomtest

    gained, lost = int((adapter & ~base).sum()), int((base & ~adapter).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _by_cluster(rows: np.ndarray, index: np.ndarray, clusters: int) -> np.ndarray:
    """[rows, k] -> [clusters, k]."""
    return np.stack([np.bincount(index, column, minlength=clusters) for column in rows.T], axis=1)


def _bootstrap(base: np.ndarray, adapter: np.ndarray, statistic: Statistic, samples: int, seed: int) -> np.ndarray:
    """Differences of resampled questions, [samples]; both sides get the same questions."""
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    n, out = len(base), np.empty(samples)
    for start in range(0, samples, _BLOCK):
        chosen = generator.integers(0, n, size=(min(_BLOCK, samples - start), n))
        block = slice(start, start + len(chosen))
        out[block] = statistic(adapter[chosen].sum(1)) - statistic(base[chosen].sum(1))
    return out


def _permutation_p(base: np.ndarray, adapter: np.ndarray, statistic: Statistic, samples: int, seed: int) -> float:
    """Two-sided: how often a random swap of the sides, question by question, gives a difference as large."""
    change = adapter - base
    if not change.any():
        return 1.0
    whole_base, whole_adapter = base.sum(0), adapter.sum(0)

    def difference(swapped: np.ndarray) -> np.ndarray:
        moved = swapped @ change
        return np.abs(statistic(whole_adapter - moved) - statistic(whole_base + moved))

    n = len(base)
    observed = difference(np.zeros((1, n)))[0] * (1 - 1e-12)
    if 2**n <= samples:
        every = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((difference(every.astype(np.float64)) >= observed).mean())
    generator = np.random.Generator(np.random.PCG64([seed, 2]))
    extreme = 0
    for start in range(0, samples, _BLOCK):
        swapped = generator.integers(0, 2, size=(min(_BLOCK, samples - start), n)).astype(np.float64)
        extreme += int((difference(swapped) >= observed).sum())
    return (extreme + 1) / (samples + 1)
