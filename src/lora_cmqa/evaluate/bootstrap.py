"""Paired differences with intervals.

Rows of one question are not independent, so whole questions are drawn: the cluster bootstrap (Miller 2024, "Adding
Error Bars to Evals", section 2.2; Efron & Tibshirani 1993, chapter 8). The p-value is a sign-flip permutation test
over the same clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataError

_BLOCK = 256  # bootstrap samples drawn at once: bounds the memory


@dataclass(frozen=True, slots=True)
class Paired:
    """One row of a report. `difference` is adapter - base; `detectable` the smallest difference that n clusters with
    this spread find with 80 % power at the 5 % level."""

    base: float
    adapter: float
    difference: float
    ci95: tuple[float, float]
    p: float
    n: int  # clusters
    detectable: float

    @property
    def is_shown(self) -> bool:
        """The interval excludes zero."""
        return self.ci95[0] > 0 or self.ci95[1] < 0


def paired(
    base: np.ndarray,
    adapter: np.ndarray,
    clusters: Sequence[str],
    *,
    weights: np.ndarray | None = None,
    samples: int = 10_000,
    seed: int = 42,
) -> Paired:
    """Compare two values a row, float [rows]. `clusters` names each row's question; `weights` [rows] makes the mean a
    ratio (sum of weight x value / sum of weights: loss per token), default 1.

    Raises DataError for fewer than two clusters.
    """
    w = np.ones(len(base)) if weights is None else np.asarray(weights, dtype=np.float64)
    names = {c: i for i, c in enumerate(dict.fromkeys(clusters))}
    if len(names) < 2:
        raise DataError(f"{len(base)} rows of {len(names)} question: an interval needs at least two questions")
    index = np.array([names[c] for c in clusters])
    weight = np.bincount(index, w)
    base_sum, adapter_sum = np.bincount(index, w * base), np.bincount(index, w * adapter)
    difference_sum = adapter_sum - base_sum
    total = weight.sum()
    difference = float(difference_sum.sum() / total)
    draws = _bootstrap(difference_sum, weight, samples, seed)
    low, high = np.quantile(draws, (0.025, 0.975))
    return Paired(
        base=float(base_sum.sum() / total),
        adapter=float(adapter_sum.sum() / total),
        difference=difference,
        ci95=(float(low), float(high)),
        p=_sign_flip_p(difference_sum, samples, seed),
        n=len(names),
        detectable=float((1.959964 + 0.841621) * draws.std(ddof=1)),
    )


def _bootstrap(difference: np.ndarray, weight: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Ratio of resampled sums, [samples]."""
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    n, out = len(difference), np.empty(samples)
    for start in range(0, samples, _BLOCK):
        chosen = generator.integers(0, n, size=(min(_BLOCK, samples - start), n))
        out[start : start + len(chosen)] = difference[chosen].sum(1) / weight[chosen].sum(1)
    return out


def _sign_flip_p(difference: np.ndarray, samples: int, seed: int) -> float:
    """Two-sided: how often a random sign per cluster gives a sum as large. Exact where all signs can be tried."""
    observed = abs(difference.sum()) * (1 - 1e-12)
    n = len(difference)
    if 2**n <= samples:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((np.abs(signs @ difference) >= observed).mean())
    generator = np.random.Generator(np.random.PCG64([seed, 2]))
    extreme = 0
    for start in range(0, samples, _BLOCK):
        signs = 1 - 2 * generator.integers(0, 2, size=(min(_BLOCK, samples - start), n))
        extreme += int((np.abs(signs @ difference) >= observed).sum())
    return (extreme + 1) / (samples + 1)
