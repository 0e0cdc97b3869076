"""How long an evaluation will take: its tokens are counted, and this machine is timed on a few of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from ..core import TokenizedExample
from ..engine.base import Request
from ..engine.embedded import EmbeddedEngine
from ..engine.run import OpenRun
from ..engine.sampling import SamplingParams
from .nll import row_losses
from .ranking import CandidateSet, encode_answers, prompt_ids

_SMALL = 60_000  # tokens that are not worth a trial
_TRIAL_TOKENS, _TRIAL_BATCH, _TRIAL_STEPS = 1500, 32, 6


def expected_seconds(
    opened: OpenRun,
    *,
    rows: Sequence[TokenizedExample],
    sets: Sequence[CandidateSet],
    rank_tokens: int,
    probe_tokens: int,
    new_tokens: int,
) -> float:
    """For both sides; `new_tokens` are those of one side, at most. 0 where it is little, and nothing is tried then."""
    read = 2 * (sum(map(len, rows)) + _ranked_tokens(opened, sets, rank_tokens) + probe_tokens)
    if read + 2 * new_tokens < _SMALL:
        return 0.0
    reading, writing = _trial(opened, rows)
    return read * reading + 2 * new_tokens * writing


def _ranked_tokens(opened: OpenRun, sets: Sequence[CandidateSet], rank_tokens: int) -> int:
    """Of each question once, of each candidate after it, and of each answer alone."""
    ids = encode_answers([a for c in sets for a in c.answers], opened.template, rank_tokens)
    asked = sum(len(prompt_ids(c.question, opened.template, None)) for c in sets)
    return asked + sum(len(ids[a]) for c in sets for a in c.answers) + sum(map(len, ids.values()))


def _trial(opened: OpenRun, rows: Sequence[TokenizedExample]) -> tuple[float, float]:
    """Seconds per token read and per token written, of `_TRIAL_BATCH` answers at once."""
    some: list[TokenizedExample] = []
    for row in rows:
        if some and sum(map(len, some)) + len(row) > _TRIAL_TOKENS:
            break
        some.append(row)
    row_losses(opened.model, some[:1])  # the first forward also warms up
    reading = _seconds(lambda: row_losses(opened.model, some)) / sum(map(len, some))
    engine = EmbeddedEngine(opened.model, opened.tokenizer, ())
    prompt = tuple(some[0].input_ids[:32].tolist())

    def write(steps: int) -> float:
        requests = [Request(prompt, SamplingParams(max_new_tokens=steps))] * _TRIAL_BATCH
        return _seconds(lambda: engine.generate(requests))

    one_step = max(0.0, write(1 + _TRIAL_STEPS) - write(1)) / _TRIAL_STEPS
    return reading, one_step / _TRIAL_BATCH


def _seconds(work: object) -> float:
    started = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - started
