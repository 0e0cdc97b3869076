"""Does the model find a question's own answer among others? Top-1, Top-5 and MRR, as the cMedQA papers count them.

    question, candidates -> log P(answer | question) of each -> rank of the best right one

    by length    log P(answer | question) / scored tokens
    by PMI       log P(answer | question) - log P(answer), where log P(answer) is taken after an empty question
                 (the domain premise of Holtzman et al. 2021, arXiv 2104.08315) and once per answer

A question's prefix is computed once: its keys and values are repeated over the candidates, which then go through the
model side by side. `answer_log_probs` is the only door to the model; `answer_log_probs_plain` defines it.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core import IGNORE, Example, Message
from ..data.template import ChatTemplate, encode_all
from ..engine.plain import as_cache
from ..errors import DataError
from ..lora.decoder import causal_lm, head_losses

_UNLIMITED = 1 << 30


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """One question and its candidates; `labels` is True for a right answer, and at least one is."""

    question_id: str
    question: str
    answers: tuple[str, ...]
    labels: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Rank of the best right answer, 1 the best, int64 [questions]; `tokens` counts scored answer tokens."""

    by_length: np.ndarray
    by_pmi: np.ndarray
    tokens: int


# ---- which candidates ----------------------------------------------------------------------------------------------


def candidate_sets(
    data: Path, split: str, examples: Sequence[Example], *, questions: int, candidates: int, seed: int
) -> tuple[list[CandidateSet], bool]:
    """The split's ranking lists, and whether they come from the data's candidates file.

    questions    drawn by seed; -1 takes all
    candidates   of each list: every right answer, and of the wrong ones those that stand in most lists, by seed
                 among equals: lists share answers, and log P(answer) is needed for fewer; 0 takes the whole list

    Without a candidates file the wrong ones are answers of the split's other questions (`examples`).
    A list without a wrong answer is left out; none may be left. Raises DataError for a file that is not in
    `cmqa prepare`'s form.
    """
    file = data / "candidates" / f"{split}.jsonl"
    asked = {e.question_id for e in examples}
    if file.is_file():
        lists, drawn = [c for c in _read_lists(file) if c.question_id in asked], True
    else:
        lists, drawn = _made_lists(examples), False
    lists = [c for c in lists if not all(c.labels)]
    generator = np.random.Generator(np.random.PCG64([seed, 4]))
    if 0 <= questions < len(lists):
        lists = [lists[i] for i in sorted(generator.permutation(len(lists))[:questions])]
    often = Counter(a for c in lists for a in c.answers)
    order = sorted(often)
    generator.shuffle(order)
    order.sort(key=lambda a: -often[a])  # stable: among equals the seed's order
    place = {a: i for i, a in enumerate(order)}
    return [_shortened(c, candidates, place) for c in lists], drawn


def _shortened(c: CandidateSet, count: int, place: dict[str, int]) -> CandidateSet:
    if not count or len(c.answers) <= count:
        return c
    right = [i for i, y in enumerate(c.labels) if y]
    wrong = sorted((i for i, y in enumerate(c.labels) if not y), key=lambda i: place[c.answers[i]])
    kept = sorted([*right, *wrong[: max(1, count - len(right))]])
    return CandidateSet(c.question_id, c.question, tuple(c.answers[i] for i in kept), tuple(c.labels[i] for i in kept))


def _made_lists(examples: Sequence[Example]) -> list[CandidateSet]:
    """Each question against every other question's answers."""
    own: dict[str, list[Example]] = {}
    for e in examples:
        own.setdefault(e.question_id, []).append(e)
    answers = list(dict.fromkeys(e.answer for e in examples))
    lists = []
    for rows in own.values():
        right = {e.answer for e in rows}
        labels = tuple(a in right for a in answers)
        lists.append(CandidateSet(rows[0].question_id, rows[0].question, tuple(answers), labels))
    return lists


def _read_lists(file: Path) -> Iterator[CandidateSet]:
    texts: dict[str, str] = {}
    answers = file.parent / "answers.jsonl"
    for row, entry in _json_lines(answers):
        texts[_field(entry, "ans_id", answers, row)] = _field(entry, "content", answers, row)
    for row, entry in _json_lines(file):
        ids, labels = _field(entry, "candidates", file, row), _field(entry, "labels", file, row)
        if missing := [i for i in ids if i not in texts]:
            raise DataError(f"candidate {missing[0]} is not in answers.jsonl", file=file, row=row)
        if len(ids) != len(labels) or not any(labels):
            raise DataError(
                f"{len(ids)} candidates with {len(labels)} labels, {sum(map(bool, labels))} of them right",
                file=file,
                row=row,
                hint="`cmqa prepare` writes these lists anew.",
            )
        yield CandidateSet(
            str(_field(entry, "question_id", file, row)),
            _field(entry, "question", file, row),
            tuple(texts[i] for i in ids),
            tuple(map(bool, labels)),
        )


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"cannot be read: {e}", file=file, hint="`cmqa prepare` writes these lists anew.") from None
    for row, line in enumerate(lines, start=1):
        try:
            yield row, json.loads(line)
        except ValueError:
            raise DataError("not a line of JSON", file=file, row=row) from None


def _field(entry: Any, name: str, file: Path, row: int) -> Any:
    if not isinstance(entry, dict) or name not in entry:
        raise DataError("the field is missing", file=file, row=row, field=name)
    return entry[name]


# ---- ranking -------------------------------------------------------------------------------------------------------


def rank_answers(
    model: Any,
    sets: Sequence[CandidateSet],
    template: ChatTemplate,
    *,
    system: str | None = None,
    answer_tokens: int = 0,
    pmi: bool = True,
) -> Ranking:
    """Rank with `model` as it stands (adapter on or off). A wrong answer that scores the same counts as better.

    answer_tokens   of each answer at most so many are scored; 0 scores all, the end token too
    pmi             False leaves log P(answer) out, and `by_pmi` is empty
    """
    ids = encode_answers([a for c in sets for a in c.answers], template, answer_tokens)
    alone: dict[str, float] = {}
    if pmi:
        empty = prompt_ids("", template, system)
        alone = dict(zip(ids, answer_log_probs(model, empty, list(ids.values())).tolist(), strict=True))
    by_length, by_pmi = [], []
    for c in sets:
        rows = [ids[a] for a in c.answers]
        scores = answer_log_probs(model, prompt_ids(c.question, template, system), rows)
        labels = np.array(c.labels)
        by_length.append(rank_of_right(scores / [len(r) for r in rows], labels))
        if pmi:
            by_pmi.append(rank_of_right(scores - [alone[a] for a in c.answers], labels))
    tokens = sum(len(ids[a]) for c in sets for a in c.answers) + (sum(map(len, ids.values())) if pmi else 0)
    return Ranking(np.array(by_length), np.array(by_pmi, dtype=np.int64), tokens)


def rank_of_right(scores: np.ndarray, labels: np.ndarray) -> int:
    """1 + the wrong answers that score at least as much as the best right one; scores [n] float, labels [n] bool."""
    return 1 + int((scores[~labels] >= scores[labels].max()).sum())


def prompt_ids(question: str, template: ChatTemplate, system: str | None) -> list[int]:
    turns = [Message("system", system)] if system else []
    return template.encode_prompt([*turns, Message("user", question)])


def encode_answers(answers: Sequence[str], template: ChatTemplate, limit: int = 0) -> dict[str, np.ndarray]:
    """{answer: its token ids with the end token, int32 [tokens], cut after `limit`}, each answer once."""
    distinct = list(dict.fromkeys(answers))
    rows = [Example((Message("user", ""), Message("assistant", a)), id=a, question_id=a) for a in distinct]
    encoded, _ = encode_all(rows, template, max_length=_UNLIMITED)
    ids = {r.id: r.input_ids[r.labels != IGNORE] for r in encoded}
    if silent := [a for a in distinct if a not in ids]:
        raise DataError(f"a candidate without text cannot be ranked: {silent[0]!r}")
    return {a: row[: limit or len(row)] for a, row in ids.items()}


# ---- the door to the model -----------------------------------------------------------------------------------------


@torch.inference_mode()
def answer_log_probs(
    model: Any, prefix: Sequence[int], answers: Sequence[np.ndarray], *, max_tokens: int = 4096
) -> np.ndarray:
    """log P(answer | prefix) of each answer, summed over its tokens, float64 [answers], in nats.

    prefix    7 8 9                      once; its keys and values are repeated
    answers         5 6 2                side by side, like lengths together, at most `max_tokens` places at once
                    4 2 .                the place after a shorter one is never looked at
    """
    from transformers import DynamicCache

    causal = causal_lm(model)
    if len(prefix) + max(map(len, answers), default=0) > getattr(causal.config, "max_position_embeddings", 1 << 30):
        return answer_log_probs_plain(model, prefix, answers)  # Qwen v1 turns a long row by its whole length
    device = causal.get_input_embeddings().weight.device
    body = causal.get_decoder()
    cache = DynamicCache(config=body.config)
    ids = torch.tensor([list(prefix)], device=device)
    first = body(input_ids=ids, use_cache=True, **as_cache(body, cache)).last_hidden_state[:, -1:]
    scores = np.zeros(len(answers))
    for group in _groups([len(a) for a in answers], max_tokens):
        rows = [torch.from_numpy(answers[i].astype(np.int64)) for i in group]
        targets = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = torch.arange(targets.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        hidden = first.expand(len(rows), -1, -1)
        if targets.shape[1] > 1:
            branch = copy.deepcopy(cache)
            branch.batch_repeat_interleave(len(rows))
            places = torch.arange(len(prefix), len(prefix) + targets.shape[1] - 1, device=device)
            after = body(
                input_ids=targets[:, :-1].to(device),
                position_ids=places[None].expand(len(rows), -1),
                use_cache=True,
                **as_cache(body, branch),
            ).last_hidden_state
            hidden = torch.cat([hidden, after], dim=1)
        losses = head_losses(model, hidden[real.to(device)], targets[real]).double().cpu()
        owner = torch.arange(len(rows))[:, None].expand_as(targets)[real]
        scores[group] = -torch.zeros(len(rows), dtype=torch.float64).index_add_(0, owner, losses).numpy()
    return scores


def _groups(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of like lengths; a group's places, padding included, are at most max_tokens (or one row)."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if group and (len(group) + 1) * lengths[group[0]] > max_tokens:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


@torch.inference_mode()
def answer_log_probs_plain(model: Any, prefix: Sequence[int], answers: Sequence[np.ndarray]) -> np.ndarray:
    """The definition: each candidate alone, with its prefix, through the whole model."""
    device = causal_lm(model).get_input_embeddings().weight.device
    scores = []
    for answer in answers:
        ids = torch.tensor([[*prefix, *answer.tolist()]], device=device)
        logits = model(input_ids=ids, logits_to_keep=len(answer) + 1).logits[0, :-1]
        log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        scores.append(float(log_p.gather(1, ids[0, len(prefix) :, None]).double().sum()))
    return np.array(scores)
