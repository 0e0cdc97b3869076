"""Train, dev and test without leaks: a cluster of like rows goes to one side whole.

    cluster   rows joined by the same question_id, near-equal questions (5-gram Jaccard >= 0.7) or answers (>= 0.7)

MinHash finds who might be alike (rensa); the Jaccard index over character 5-grams then decides exactly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ..core import Example, Split
from ..errors import ConfigError

QUESTION_JACCARD = 0.7
ANSWER_JACCARD = 0.7
_BLOCK = 8192  # texts whose 5-grams are held at once
_PERMUTATIONS, _BANDS = 128, 32  # 4 rows a band: at Jaccard 0.7 a pair is missed once in 6,000


@dataclass(frozen=True, slots=True)
class Leaks:
    """Distinct questions, and answers by row, of one split that have a near-duplicate in another."""

    questions: int
    of_questions: int
    answers: int
    of_answers: int


Alike = dict[str, list[tuple[str, str]]]  # "question", "answer" -> pairs of near-equal texts


def find_alike(examples: Sequence[Example]) -> Alike:
    """Every pair of near-equal questions and answers: found once, used by the split and by each leak count."""
    found: Alike = {}
    for kind, threshold in (("question", QUESTION_JACCARD), ("answer", ANSWER_JACCARD)):
        texts = list(dict.fromkeys(getattr(e, kind) for e in examples))
        found[kind] = [(texts[a], texts[b]) for a, b in near_pairs(texts, threshold)]
    return found


def split(
    examples: Sequence[Example], *, dev: float = 0.1, test: float = 0.1, seed: int = 42, alike: Alike | None = None
) -> list[Example]:
    """Examples with `.split` set, in their order; a share `dev` and `test` of the rows, by whole clusters.

    Rows that name a split already keep it, and rows of their cluster follow the strictest side (test, dev, train),
    so an official split may lose train rows' leaks only when the caller asks (prepare reports them).
    """
    if not (0 <= dev < 1 and 0 <= test < 1 and dev + test < 1):
        raise ConfigError(f"dev {dev} and test {test} must be shares that leave something to train on")
    if all(e.split for e in examples):
        return list(examples)
    members: dict[int, list[int]] = defaultdict(list)
    for i, c in enumerate(clusters(examples, alike)):
        members[c].append(i)
    order = list(members)
    np.random.Generator(np.random.PCG64(seed)).shuffle(order)
    side: dict[int, Split] = {}
    wanted = {"test": test * len(examples), "dev": dev * len(examples)}
    for c in order:
        named = {examples[i].split for i in members[c]} - {None}
        chosen: Split = "train"
        for s in ("test", "dev"):
            if s in named or (not named and wanted[s] >= len(members[c])):
                chosen = s  # type: ignore[assignment]
                wanted[s] -= len(members[c])
                break
        for i in members[c]:
            side[i] = examples[i].split or chosen
    return [replace(e, split=side[i]) for i, e in enumerate(examples)]


def clusters(examples: Sequence[Example], alike: Alike | None = None) -> list[int]:
    """A cluster number for each example."""
    parent = list(range(len(examples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, e in enumerate(examples):
        parent[root(i)] = root(first.setdefault(e.question_id, i))
    for kind, pairs in (alike or find_alike(examples)).items():
        place: dict[str, int] = {}
        for i, e in enumerate(examples):
            text = getattr(e, kind)
            parent[root(i)] = root(place.setdefault(text, i))
        for one, other in pairs:
            if one in place and other in place:
                parent[root(place[one])] = root(place[other])
    return [root(i) for i in range(len(examples))]


def near_pairs(texts: Sequence[str], threshold: float) -> Iterator[tuple[int, int]]:
    """Pairs (i, j), i < j, of texts with Jaccard(5-grams) >= threshold; equal texts are paired with their first."""
    first: dict[str, int] = {}
    distinct: list[int] = []
    for i, text in enumerate(texts):
        if text in first:
            yield first[text], i
        else:
            first[text] = i
            distinct.append(i)
    grams = lru_cache(maxsize=1 << 14)(lambda i: shingles(texts[distinct[i]]))
    for a, b in _candidate_pairs([texts[i] for i in distinct]):
        if jaccard(grams(a), grams(b)) >= threshold:
            yield distinct[a], distinct[b]


def _candidate_pairs(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Pairs that agree in at least one band of their MinHash digests."""
    if len(texts) < 2:
        return
    digests = _digests(texts).reshape(len(texts), _BANDS, -1)
    seen: set[tuple[int, int]] = set()
    for band in range(_BANDS):
        keys = np.ascontiguousarray(digests[:, band]).view(np.dtype((np.void, digests.shape[2] * 4)))[:, 0]
        _, key, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        shared = np.flatnonzero(sizes[key] > 1)  # most texts are like no other: only these come to Python
        buckets: dict[int, list[int]] = defaultdict(list)
        for i, k in zip(shared.tolist(), key[shared].tolist(), strict=True):
            buckets[k].append(i)
        for bucket in buckets.values():
            for n, b in enumerate(bucket):
                for a in bucket[:n]:
                    if (a, b) not in seen:
                        seen.add((a, b))
                        yield a, b


def _digests(texts: Sequence[str]) -> np.ndarray:
    """uint32 [texts, _PERMUTATIONS]. In blocks: the 5-grams of 240,000 texts at once would take 2 GB."""
    from rensa import RMinHash

    out = np.empty((len(texts), _PERMUTATIONS), dtype=np.uint32)
    for start in range(0, len(texts), _BLOCK):
        sets = [list(shingles(t)) for t in texts[start : start + _BLOCK]]
        out[start : start + len(sets)] = RMinHash.digests_from_token_sets(sets, _PERMUTATIONS, 42)
    return out


def leaks(one: Sequence[Example], other: Sequence[Example], alike: Alike | None = None) -> Leaks:
    """How many questions and answers of `one` have a near-duplicate (or an equal) in `other`."""
    alike = alike or find_alike([*one, *other])
    hit = _hits(one, other, alike)
    of_answers = [e.answer in hit["answer"] for e in one]
    return Leaks(len(hit["question"]), len({e.question for e in one}), sum(of_answers), len(of_answers))


def leaking(one: Sequence[Example], other: Sequence[Example], alike: Alike | None = None) -> list[bool]:
    """Of each example of `one`: has its question or its answer a near-duplicate in `other`?"""
    alike = alike or find_alike([*one, *other])
    hit = _hits(one, other, alike)
    return [e.question in hit["question"] or e.answer in hit["answer"] for e in one]


def _hits(one: Sequence[Example], other: Sequence[Example], alike: Alike) -> dict[str, set[str]]:
    return {
        kind: _standing_in({getattr(e, kind) for e in one}, {getattr(e, kind) for e in other}, pairs)
        for kind, pairs in alike.items()
    }


def _standing_in(mine: set[str], theirs: set[str], pairs: Sequence[tuple[str, str]]) -> set[str]:
    """Those of `mine` that stand, or nearly stand, in `theirs`."""
    hit = mine & theirs
    for a, b in pairs:
        hit.update(x for x, y in ((a, b), (b, a)) if x in mine and y in theirs)
    return hit


def shingles(text: str, n: int = 5) -> frozenset[str]:
    """Character n-grams of the text without white space; a shorter text is its own."""
    bare = "".join(text.split())
    return frozenset(bare[i : i + n] for i in range(max(1, len(bare) - n + 1)))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a and b| / |a or b|."""
    both = len(a & b)
    return both / (len(a) + len(b) - both)
