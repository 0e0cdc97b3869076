"""Ranking on dev questions during training: does the adapter find a question's own answer among others?

Whole evaluations belong to `cmqa eval`; this one is small, takes the same steps, and can be broken off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core import Example
from ..data.template import ChatTemplate
from ..evaluate.ranking import CandidateSet, candidate_sets, rank_answers

CANDIDATES = 20  # of each question
ANSWER_TOKENS = 32  # of each candidate


@dataclass(frozen=True, slots=True)
class DevRanking:
    """Made by `dev_ranking`."""

    sets: Sequence[CandidateSet]
    template: ChatTemplate
    system: str | None

    def measure(self, model: Any, *, stop: Callable[[], bool] = lambda: False) -> tuple[float, float] | None:
        """(Top-1, MRR) by length; None when `stop` said so on the way."""
        model.eval()
        ranks = []
        for c in self.sets:
            if stop():
                return None
            ranks += rank_answers(
                model, [c], self.template, system=self.system, answer_tokens=ANSWER_TOKENS, pmi=False
            ).by_length.tolist()
        return float(np.mean([r == 1 for r in ranks])), float(np.mean([1 / r for r in ranks]))


def dev_ranking(
    data: Path, dev: Sequence[Example], template: ChatTemplate, *, questions: int, seed: int, system: str | None
) -> DevRanking | None:
    """None where `questions` is 0 or the data has no dev candidates."""
    if not questions or not dev or not (data / "candidates" / "dev.jsonl").is_file():
        return None
    sets, _ = candidate_sets(data, "dev", dev, questions=questions, candidates=CANDIDATES, seed=seed)
    return DevRanking(sets, template, system) if sets else None
