"""Loss per answer token, and how much of a gain is about the question.

    true pairs       answer i after its own question          loss_true
    shuffled pairs   answer i after another question          loss_shuffled

    gain   = base - adapter on the true pairs                  better at the task, whatever the reason
    style  = base - adapter on the shuffled pairs              sounds like a doctor, whatever is asked
    content = gain - style                                     answers THIS question better

Both sets hold the same answers, so content is taken answer by answer: how easy or long an answer is falls out, and the
means over tokens subtract exactly. A small adapter wins most of its gain by style; content above zero is what "better
answers" means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..core import IGNORE, Example, TokenizedExample
from ..data.pack import pack
from ..errors import DataError
from ..lora.decoder import token_losses


@dataclass(frozen=True, slots=True)
class RowLosses:
    """Per row, in the order given: `total` nats over its supervised tokens, float64 [rows]; `tokens`, int64 [rows]."""

    total: np.ndarray
    tokens: np.ndarray

    @property
    def per_token(self) -> np.ndarray:
        """float64 [rows], nats per supervised token."""
        return self.total / self.tokens


def row_losses(model: Any, rows: Sequence[TokenizedExample], *, max_tokens: int = 4096) -> RowLosses:
    """Score `rows` with `model` as it stands (adapter on or off); no pad token is computed."""
    if not rows:
        raise DataError("no row to score")
    total, tokens = np.zeros(len(rows)), np.zeros(len(rows), dtype=np.int64)
    places = {id_: i for i, id_ in enumerate(_unique_ids(rows))}
    named = [replace(r, id=id_) for r, id_ in zip(rows, places, strict=True)]
    for p in pack(named, max_tokens=max_tokens):
        losses = token_losses(model, p).double().cpu().numpy()
        row_of = np.searchsorted(np.cumsum(p.row_lengths), p.predict_at, side="right")
        index = np.array([places[i] for i in p.example_ids])[row_of]
        np.add.at(total, index, losses)
        np.add.at(tokens, index, 1)
    return RowLosses(total, tokens)


def last_answer(row: TokenizedExample) -> TokenizedExample:
    """`row` with its last answer supervised only: earlier ones of a conversation are part of what is asked."""
    taught = np.flatnonzero(row.labels != IGNORE)
    breaks = np.flatnonzero(np.diff(taught) > 1)
    if not len(breaks):
        return row
    labels = row.labels.copy()
    labels[: taught[breaks[-1] + 1]] = IGNORE
    return replace(row, labels=labels)


def shuffled_pairs(examples: Sequence[Example], *, seed: int) -> list[Example]:
    """The same answers after other questions: row i keeps its id and its answer, and is asked what row p(i) is asked.

    p is a seeded cyclic shift of a seeded order in which the rows of one question stand together, shifted by more
    than the largest group: no answer keeps a question of its own, and each question is asked as often as before.
    Raises DataError where one question owns more than half of the rows: then no such pairing exists.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    groups: dict[str, list[int]] = {}
    for i, e in enumerate(examples):
        groups.setdefault(e.question_id, []).append(i)
    largest = max(len(g) for g in groups.values())
    if 2 * largest > len(examples):
        raise DataError(f"{len(examples)} rows of {len(groups)} questions cannot be shuffled apart")
    keys = list(groups)
    generator.shuffle(keys)
    order = [i for k in keys for i in groups[k]]
    shift = int(generator.integers(largest, len(order) - largest + 1))
    out = list(examples)
    for place, i in enumerate(order):
        asked = examples[order[(place + shift) % len(order)]]
        turns = (*asked.messages[:-1], examples[i].messages[-1])
        out[i] = replace(examples[i], messages=turns, question_id=asked.question_id)
    return out


def _unique_ids(rows: Sequence[TokenizedExample]) -> list[str]:
    return [f"{i}:{r.id}" for i, r in enumerate(rows)]
