"""What the kept rows look like: their lengths, groups of like rows, rows unlike the others.

A person who looks for planted rows (arXiv 2603.02262) begins at both ends: one text many times with small changes,
and rows that no other row resembles.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..core import Example
from .personal import blur

STEP, LAST = 20, 600  # characters of a bar, and where the last one begins
GROUPS, IDS, OUTLIERS = 5, 10, 20  # of the lists
FAR = 5.0  # robust standard deviations of log(length)


def overview(examples: Sequence[Example], clusters: Sequence[int]) -> dict[str, Any]:
    """`clusters` numbers each example's cluster (data/split.py). For report.json: keys lengths, clusters, outliers."""
    return {
        "lengths": {
            "step": STEP,
            "questions": lengths(e.question for e in examples),
            "answers": lengths(e.answer for e in examples),
        },
        "clusters": groups(examples, clusters),
        "outliers": outliers(examples),
    }


def lengths(texts: Iterable[str]) -> list[int]:
    """Texts by length: [under STEP characters, under 2 STEP, ..., LAST and more]."""
    bars = np.bincount([min(len(t), LAST) // STEP for t in texts], minlength=LAST // STEP + 1)
    return bars.tolist()


def groups(examples: Sequence[Example], clusters: Sequence[int]) -> dict[str, Any]:
    """Clusters by their number of questions (a question's own answers are no group), and the largest ones."""
    members: dict[int, list[Example]] = defaultdict(list)
    for e, c in zip(examples, clusters, strict=True):
        members[c].append(e)
    sizes = {c: len({e.question_id for e in rows}) for c, rows in members.items()}
    largest = sorted((c for c, n in sizes.items() if n > 1), key=lambda c: (-sizes[c], members[c][0].id))[:GROUPS]
    return {
        "sizes": {str(n): k for n, k in sorted(Counter(sizes.values()).items())},
        "largest": [
            {
                "questions": sizes[c],
                "rows": len(members[c]),
                "ids": [e.id for e in members[c][:IDS]],
                "question": blur(members[c][0].question, names=True)[:80],
                "answer": blur(members[c][0].answer, names=True)[:80],
            }
            for c in largest
        ],
    }


def outliers(examples: Sequence[Example]) -> dict[str, Any]:
    """Rows whose question or answer is far longer or shorter than the others': how many, and the farthest.

    distance = |log length - median| / (1.4826 MAD)        a median of 100 and a usual spread of 1.5: beyond 13 or 760
    """
    if not examples:
        return {"rows": 0, "farthest": []}
    distance = np.zeros(len(examples))
    for texts in ([e.question for e in examples], [e.answer for e in examples]):
        logs = np.log([max(1, len(t)) for t in texts])
        spread = 1.4826 * np.median(np.abs(logs - np.median(logs)))
        distance = np.maximum(distance, np.abs(logs - np.median(logs)) / max(spread, 0.1))
    far = np.flatnonzero(distance > FAR)
    farthest = far[np.argsort(-distance[far], kind="stable")][:OUTLIERS].tolist()
    return {
        "rows": len(far),
        "farthest": [
            {
                "id": examples[i].id,
                "question_characters": len(examples[i].question),
                "answer_characters": len(examples[i].answer),
                "distance": round(float(distance[i]), 1),
            }
            for i in farthest
        ],
    }
