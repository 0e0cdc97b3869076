"""What was scored, row by row, on both sides: the step between a model's output and a paired difference.

    losses, ranks, answers, letters -> Measure: base [rows], adapter [rows], question of each row -> Paired

A Measure is kept whole, so that the same scores can be compared once more without the questions that have a
near-duplicate in the training rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import DataError
from .bootstrap import Paired, Statistic, paired, paired_sums, ratio
from .forgetting import Divergence, GeneralPrompt
from .nll import RowLosses
from .overlap import (
    SENTENCE_SCORES,
    bleu_of_sums,
    bleu_sums,
    copies_question,
    distinct,
    repetition_rate,
    sentence_scores,
)
from .ranking import Ranking
from .safety import RedFlag, gives_dosage, personal_data, sends_to_doctor, sends_to_emergency

SIDES = ("base", "adapter")
Answered = Sequence[dict[str, Any]]  # {"base": {"text", "finish_reason"}, "adapter": {...}, ...} a row


@dataclass(frozen=True, slots=True)
class Measure:
    """`base` and `adapter`: float or bool [rows], or float [rows, k], the sums that a corpus `statistic` is made of."""

    name: str
    base: np.ndarray
    adapter: np.ndarray
    questions: Sequence[str]
    weights: np.ndarray | None = None
    statistic: Statistic = ratio

    def paired(self, *, samples: int, seed: int, without: Collection[str] = ()) -> Paired | None:
        """The comparison over the rows whose question is not in `without`; None where fewer than two are left."""
        keep = np.array([q not in without for q in self.questions], dtype=bool)
        questions = [q for q, kept in zip(self.questions, keep, strict=True) if kept]
        if len(set(questions)) < 2:
            return None
        base, adapter = self.base[keep], self.adapter[keep]
        if base.ndim == 2:
            return paired_sums(base, adapter, questions, statistic=self.statistic, samples=samples, seed=seed)
        weights = None if self.weights is None else self.weights[keep]
        return paired(base, adapter, questions, weights=weights, statistic=self.statistic, samples=samples, seed=seed)


# ---- the task ------------------------------------------------------------------------------------------------------


def loss_measures(true: Divergence, shuffled: tuple[RowLosses, RowLosses], questions: Sequence[str]) -> list[Measure]:
    """nll, nll_shuffled and kl in nats per token; `true` and `shuffled` hold the same answers in the same order.
    content_gain = (how much lower an answer's loss is after its own question than after another) under the adapter
    minus the same under the base = nll's gain - nll_shuffled's gain."""
    base, own, tokens = true.base.per_token, true.adapter.per_token, true.base.tokens.astype(np.float64)
    if any((s.tokens != true.base.tokens).any() for s in shuffled):
        raise DataError("an answer after another question has other tokens than after its own: they do not compare")
    left, right = (s.per_token for s in shuffled)
    return [
        Measure("nll", base, own, questions, tokens),
        Measure("perplexity", base, own, questions, tokens, lambda sums: np.exp(ratio(sums))),
        Measure("nll_shuffled", left, right, questions, tokens),
        Measure("content_gain", left - base, right - own, questions, tokens),
        Measure("kl", np.zeros(len(base)), true.kl / tokens, questions, tokens),
    ]


def ranking_measures(base: Ranking, adapter: Ranking, questions: Sequence[str]) -> list[Measure]:
    """top1, top5 (a right answer among the first, yes or no) and mrr (1 / rank), by length and by PMI."""
    out = []
    for suffix, left, right in (("", base.by_length, adapter.by_length), ("_pmi", base.by_pmi, adapter.by_pmi)):
        out += [
            Measure(f"top1{suffix}", left <= 1, right <= 1, questions),
            Measure(f"top5{suffix}", left <= 5, right <= 5, questions),
            Measure(f"mrr{suffix}", 1 / left, 1 / right, questions),
        ]
    return out


def score_answers(answered: Answered) -> None:
    """Puts {"scores": {...}} beside each text, against the row's references."""
    for row in answered:
        for side in SIDES:
            text = row[side]["text"]
            row[side]["scores"] = {k: round(v, 4) for k, v in sentence_scores(text, row["references"]).items()}


def answer_measures(answered: Answered) -> list[Measure]:
    """Of scored answers, one a question. Text scores are 0 .. 100; distinct, repetition, ended and copied shares."""
    questions = [r["question_id"] for r in answered]

    def each(name: str, value: Callable[[dict[str, Any], dict[str, Any]], Any]) -> Measure:
        left, right = (np.array([value(r, r[side]) for r in answered]) for side in SIDES)
        return Measure(name, left, right, questions)

    left, right = (np.stack([bleu_sums(r[side]["text"], r["references"]) for r in answered]) for side in SIDES)
    return [
        Measure("bleu", left, right, questions, statistic=bleu_of_sums),
        *(each(name, lambda r, a, name=name: a["scores"][name]) for name in SENTENCE_SCORES),  # type: ignore[misc]
        each("distinct_1", lambda r, a: distinct(a["text"], 1)),
        each("distinct_2", lambda r, a: distinct(a["text"], 2)),
        each("repetition", lambda r, a: repetition_rate(a["text"])),
        each("length", lambda r, a: float(len(a["text"]))),
        each("ended", lambda r, a: a["finish_reason"] == "stop"),
        each("copied", lambda r, a: copies_question(r["question"], a["text"])),
    ]


# ---- forgetting and safety -----------------------------------------------------------------------------------------


def general_measures(prompts: Sequence[GeneralPrompt], answered: Answered, moved: Divergence) -> list[Measure]:
    ids = [p.id for p in prompts]
    left, right = (
        np.array([p.is_right(r[side]["text"]) for p, r in zip(prompts, answered, strict=True)]) for side in SIDES
    )
    tokens = moved.base.tokens.astype(np.float64)
    return [
        Measure("general_chat", left, right, ids),
        Measure("kl_general", np.zeros(len(ids)), moved.kl / tokens, ids, tokens),
    ]


def probe_measure(said: Sequence[Sequence[str]], right: Sequence[str], ids: Sequence[str]) -> Measure:
    """`said`: the letters of base and of adapter."""
    left, own = (np.array([a == b for a, b in zip(letters, right, strict=True)]) for letters in said)
    return Measure("probe", left, own, ids)


def safety_measures(flags: Sequence[RedFlag], answered: Answered) -> list[Measure]:
    """Yes or no for each red flag's answer."""
    ids = [f.id for f in flags]

    def each(name: str, value: Callable[[RedFlag, str], bool]) -> Measure:
        left, right = (
            np.array([value(f, r[side]["text"]) for f, r in zip(flags, answered, strict=True)]) for side in SIDES
        )
        return Measure(name, left, right, ids)

    return [
        each("safe", lambda f, text: f.is_safe(text)),
        each("emergency", lambda f, text: sends_to_emergency(text)),
        each("doctor", lambda f, text: sends_to_doctor(text)),
    ]


def harm_measures(answered: Answered) -> list[Measure]:
    """A dose or personal data in any generated answer, of the task and of the red flags alike."""
    ids = [r["question_id"] for r in answered]
    out = []
    for name, found in (("dosage", gives_dosage), ("personal", personal_data)):
        left, right = (np.array([found(r[side]["text"]) for r in answered]) for side in SIDES)
        out.append(Measure(name, left, right, ids))
    return out
