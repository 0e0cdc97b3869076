"""Ranking lists: a question, candidate answers, and which of them answer it. Read from a source, or drawn.

    OUT/candidates/dev.jsonl       {"question_id", "question", "candidates": [ans_id, ...], "labels": [0 | 1, ...]}
    OUT/candidates/answers.jsonl   {"ans_id", "question_id", "content"}         the text of every candidate

A source without lists gets drawn ones for dev and test: 100 candidates a question as in the cMedQA papers, the wrong
ones from the same split (an answer the model was trained on would be too easy to tell apart) and from other clusters
(a near-duplicate of the right answer is not wrong).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..core import Example, Split
from ..errors import DataError
from .files import find, on_disk
from .tables import csv_fields, json_rows

FOLDER, ANSWERS = "candidates", "answers.jsonl"
CANDIDATES = 100  # of a drawn list, right ones included
QUESTIONS = 1000  # of a split that get a drawn list, at most
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True, slots=True)
class CandidateList:
    """One question of a ranking task: candidate answer ids, and 1 for those that answer it."""

    question_id: str
    candidates: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(slots=True)
class Candidates:
    """Lists by split, and the texts of candidates that are no rows (any more): ans_id -> (question_id, answer)."""

    lists: dict[Split, list[CandidateList]] = field(default_factory=dict)
    texts: dict[str, tuple[str, str]] = field(default_factory=dict)

    def prefixed(self, prefix: str) -> Candidates:
        """The same with `prefix` before every id."""
        lists = {
            s: [
                replace(c, question_id=prefix + c.question_id, candidates=tuple(prefix + a for a in c.candidates))
                for c in of
            ]
            for s, of in self.lists.items()
        }
        return Candidates(lists, {prefix + a: (prefix + q, t) for a, (q, t) in self.texts.items()})


# ---- reading -------------------------------------------------------------------------------------------------------


def read_cmqa_candidates(folder: Path) -> Candidates:
    """The *_candidates.txt files of a cMQA folder or zip; their texts are the rows'."""
    return Candidates({s: found for s in SPLITS if (found := read_candidates(folder, s))})


def read_candidates(folder: Path, split: str) -> list[CandidateList]:
    """The ranking lists of a split: question_id,ans_id,cnt,label rows, or question_id,pos_ans_id,neg_ans_id for train.

    Without a file: []. Raises DataError for a header narrower than its rows (old cMedQA v1 files name 3 of 4 columns).
    """
    file = find(folder, (f"{split}_candidates.txt", f"{split}_candidates.csv"))
    if file is None:
        return []
    rows = csv_fields(file)
    _, header = next(rows, (1, []))
    lists: dict[str, dict[str, int]] = {}
    for line, row in rows:
        if len(row) > len(header):
            raise DataError(
                f"{len(row)} fields under a header of {len(header)} names",
                file=file.name,
                row=line,
                hint=f"Name all columns: sed -i '1s/.*/question_id,ans_id,cnt,label/' {file.base}",
            )
        if "neg_ans_id" in header and len(row) == 3:
            of = lists.setdefault(row[0], {})
            of[row[1]] = 1
            of.setdefault(row[2], 0)
        elif len(row) == 4 and row[3] in ("0", "1"):
            lists.setdefault(row[0], {})[row[1]] = int(row[3])
        else:
            raise DataError(
                f"{len(row)} fields where question_id,ans_id,cnt,label are expected", file=file.name, row=line
            )
    return [CandidateList(q, tuple(c), tuple(c.values())) for q, c in lists.items()]


def read_prepared_candidates(folder: Path) -> Candidates:
    """The inverse of `write_candidates`. Raises DataError for a file that is not in its form."""
    found = Candidates()
    try:
        for split in SPLITS:
            file = folder / f"{split}.jsonl"
            if file.is_file():
                found.lists[split] = [
                    CandidateList(row["question_id"], tuple(row["candidates"]), tuple(row["labels"]))
                    for _, row in json_rows(on_disk(file))
                ]
        if found.lists:
            file = folder / ANSWERS
            for _, row in json_rows(on_disk(file)):
                found.texts[row["ans_id"]] = (row["question_id"], row["content"])
    except (KeyError, TypeError) as e:
        raise DataError(f"not a ranking list that `cmqa prepare` writes ({e})", file=file) from None
    return found


# ---- drawing -------------------------------------------------------------------------------------------------------


def draw_candidates(examples: Sequence[Example], clusters: Sequence[int], *, seed: int) -> list[CandidateList]:
    """A list for each question of one split (QUESTIONS of them, drawn by `seed`), in the rows' order.

    clusters   of each example, as `split.clusters` numbers them: a wrong candidate is of another one
    """
    asked: dict[str, list[int]] = {}
    first: dict[str, int] = {}  # one answer word for word is one candidate
    for i, e in enumerate(examples):
        if [m.role for m in e.messages if m.role != "system"] == ["user", "assistant"]:
            asked.setdefault(e.question_id, []).append(first.setdefault(e.answer, i))
    generator = np.random.Generator(np.random.PCG64([seed, 1]))
    answers = np.array(list(first.values()), dtype=np.int64)
    of_cluster = np.array(clusters, dtype=np.int64)
    questions = list(asked)
    chosen = sorted(generator.permutation(len(questions))[:QUESTIONS].tolist())
    lists = []
    for question in (questions[i] for i in chosen):
        right = list(dict.fromkeys(asked[question]))
        others = generator.permutation(answers)
        wrong = others[~np.isin(of_cluster[others], of_cluster[right])][: CANDIDATES - len(right)].tolist()
        if wrong:
            order = generator.permutation([*right, *wrong]).tolist()
            ids = tuple(examples[i].id for i in order)
            lists.append(CandidateList(question, ids, tuple(int(i in right) for i in order)))
    return lists


# ---- writing -------------------------------------------------------------------------------------------------------


def write_candidates(
    folder: Path,
    lists: Mapping[Split, Iterable[CandidateList]],
    questions: Mapping[Split, Mapping[str, str]],
    texts: Mapping[str, tuple[str, str]],
) -> dict[str, int]:
    """Lists of the questions that are there, without the candidates whose text is not; returns questions per split.

    questions  split -> question_id -> text     texts  ans_id -> (question_id, answer)
    """
    counts: dict[str, int] = {}
    used: set[str] = set()
    for split, of in lists.items():
        rows = []
        for c in of:
            here = [(a, y) for a, y in zip(c.candidates, c.labels, strict=True) if a in texts]
            if c.question_id not in questions[split] or not any(y for _, y in here):
                continue
            used.update(a for a, _ in here)
            row = {"question_id": c.question_id, "question": questions[split][c.question_id]}
            rows.append(row | {"candidates": [a for a, _ in here], "labels": [y for _, y in here]})
        if rows:
            folder.mkdir(exist_ok=True)
            _write_lines(folder / f"{split}.jsonl", rows)
            counts[split] = len(rows)
    if counts:
        answers = ({"ans_id": a, "question_id": texts[a][0], "content": texts[a][1]} for a in sorted(used))
        _write_lines(folder / ANSWERS, answers)
    return counts


def _write_lines(file: Path, rows: Iterable[Mapping[str, object]]) -> None:
    with file.open("w", encoding="utf-8") as f:
        for row in rows:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
