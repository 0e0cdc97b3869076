"""What did the base know that the adapter no longer knows?

    general chat     everyday questions bundled here: is the expected word in the answer?
    general probe    multiple choice in the CSV forms of C-Eval, CMMLU and CMExam: is the right letter the likeliest?
    KL               KL(base || adapter) per token, on general answers and on the task's: how far did it move?
                     (on the new task it foretells forgetting: RL's Razor, arXiv 2509.04259)

C-Eval   id,question,A,B,C,D,answer[,explanation]        subject_dev.csv, subject_val.csv
CMMLU    ,Question,A,B,C,D,Answer                        dev/subject.csv, test/subject.csv
CMExam   Question,Options,Answer,...                     options as lines "A ..." in one field
index    suite,subject,file,id                           a fixed subset of the files beside it
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..core import IGNORE, Example, Message, TokenizedExample
from ..data.pack import pack
from ..data.template import ChatTemplate
from ..errors import DataError, ModelError
from ..lora.decoder import head_logits, hidden_states
from .nll import RowLosses

GENERAL_FILE = "general_chat.jsonl"
_KL_ROWS = 32  # positions whose two distributions are held at once


# ---- bundled general chat ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class GeneralPrompt:
    """`answer` is what KL is measured on; any of `accept` in a generated answer makes it right."""

    id: str
    lang: str
    prompt: str
    answer: str
    accept: tuple[str, ...]

    def is_right(self, answer: str) -> bool:
        return any(a in answer.lower() for a in self.accept)

    @property
    def example(self) -> Example:
        turns = (Message("user", self.prompt), Message("assistant", self.answer))
        return Example(turns, id=self.id, question_id=self.id)


def general_prompts() -> list[GeneralPrompt]:
    """Forty, half Chinese, half English."""
    lines = prompt_file(GENERAL_FILE).decode().splitlines()
    return [GeneralPrompt(**(json.loads(line) | {"accept": tuple(json.loads(line)["accept"])})) for line in lines]


def prompt_file(name: str) -> bytes:
    """A file of evaluate/prompts."""
    return files("lora_cmqa.evaluate").joinpath("prompts", name).read_bytes()


# ---- KL --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Divergence:
    """Of the same rows: the losses of base and adapter, and `kl` nats summed over each row's supervised tokens,
    float64 [rows]."""

    base: RowLosses
    adapter: RowLosses
    kl: np.ndarray


@torch.inference_mode()
def diverge(model: Any, rows: Sequence[TokenizedExample], *, max_tokens: int = 4096) -> Divergence:
    """KL(base || adapter) = sum over the vocabulary of p_base log(p_base / p_adapter), at each supervised position.

    `model` is a PeftModel; each side's hidden states are computed once and give losses and KL together.
    """
    if not rows:
        raise DataError("no row to score")
    sums = np.zeros((4, len(rows)))  # tokens, base loss, adapter loss, KL
    named = [TokenizedExample(r.input_ids, r.labels, str(i), r.question_id) for i, r in enumerate(rows)]
    for p in pack(named, max_tokens=max_tokens):
        with model.disable_adapter():
            before = hidden_states(model, p)
        after = hidden_states(model, p)
        owner = np.array(p.example_ids, dtype=np.int64)[
            np.searchsorted(np.cumsum(p.row_lengths), p.predict_at, side="right")
        ]
        for start in range(0, len(before), _KL_ROWS):
            some = slice(start, start + _KL_ROWS)
            targets = torch.from_numpy(p.targets[some]).long().to(before.device)[:, None]
            with model.disable_adapter():
                base = head_logits(model, before[some]).log_softmax(-1)
            adapter = head_logits(model, after[some]).log_softmax(-1)
            losses = [-side.gather(1, targets)[:, 0] for side in (base, adapter)]
            kl = base.exp().mul_(base - adapter).sum(1)
            for row, values in zip(sums[1:], (*losses, kl), strict=True):
                np.add.at(row, owner[some], values.double().cpu().numpy())
        np.add.at(sums[0], owner, 1)
    tokens = sums[0].astype(np.int64)
    return Divergence(RowLosses(sums[1], tokens), RowLosses(sums[2], tokens), sums[3])


# ---- general probe ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ProbeQuestion:
    """`options` {letter: text}; `answer` is one letter; `suite` is the folder that holds val or test."""

    id: str
    suite: str
    subject: str
    question: str
    options: dict[str, str]
    answer: str

    def asked(self) -> str:
        lines = [f"{letter}. {text}" for letter, text in self.options.items()]
        return "\n".join([f"单项选择题，科目：{self.subject}。请只回答正确选项的字母。", self.question, *lines])


@dataclass(frozen=True, slots=True)
class Probe:
    """`shots`: up to five worked questions of each (suite, subject); `skipped`: rows with several right letters."""

    questions: tuple[ProbeQuestion, ...]
    shots: dict[tuple[str, str], tuple[ProbeQuestion, ...]]
    skipped: int


def read_probe(path: str | Path, *, limit: int = 0, seed: int = 42) -> Probe:
    """The probe under a folder, of one CSV, or of an index; `limit` questions are drawn by seed, 0 takes all.

    Raises DataError where there is nothing to ask, and for a file in none of the forms.
    """
    path = Path(path)
    if not path.exists():
        raise DataError("no such file or folder", file=path, hint="--probe DIR with C-Eval, CMMLU or CMExam CSV files.")
    root = path if path.is_dir() else path.parent
    everything = [path] if path.is_file() and not _is_index(path) else sorted(root.rglob("*.csv"))
    indices = [f for f in everything if _is_index(f) and (path.is_dir() or f == path)]
    wanted = _wanted(indices, root) if indices else None
    shots: dict[tuple[str, str], tuple[ProbeQuestion, ...]] = {}
    found: list[ProbeQuestion] = []
    skipped = 0
    for file in everything:
        if _is_index(file) or not (wanted is None or file in wanted or _is_dev(file)):
            continue
        questions, several = _read_form(file, root)
        if _is_dev(file):
            shots |= {(q.suite, q.subject): tuple(questions[:5]) for q in questions[:1]}
            continue
        found += [q for q in questions if wanted is None or q.id.rsplit(":", 1)[1] in wanted[file]]
        skipped += several
    if not found:
        raise DataError("no question to ask", file=path, hint="Folders named dev hold the worked examples only.")
    if limit and limit < len(found):
        chosen = np.random.Generator(np.random.PCG64([seed, 5])).permutation(len(found))[:limit]
        found = [found[i] for i in sorted(chosen)]
    return Probe(tuple(found), shots, skipped)


def probe_rows(probe: Probe, template: ChatTemplate, *, shots: int, system: str | None) -> list[TokenizedExample]:
    """Each question as a row that ends with the right letter, which alone is supervised; `shots` turns before it."""
    letters = letter_ids(template)
    rows = []
    for q in probe.questions:
        turns = [Message("system", system)] if system else []
        for s in probe.shots.get((q.suite, q.subject), ())[:shots]:
            turns += [Message("user", s.asked()), Message("assistant", s.answer)]
        ids = np.array([*template.encode_prompt([*turns, Message("user", q.asked())]), letters[q.answer]], np.int32)
        labels = np.full(len(ids), IGNORE, np.int32)
        labels[-1] = ids[-1]
        rows.append(TokenizedExample(ids, labels, q.id, q.id))
    return rows


@torch.inference_mode()
def answer_probe(
    model: Any, probe: Probe, rows: Sequence[TokenizedExample], template: ChatTemplate, *, max_tokens: int = 4096
) -> list[str]:
    """The letter that `model` as it stands finds likeliest for each of `probe_rows`."""
    letters = letter_ids(template)
    said: dict[str, str] = {}
    options = {q.id: list(q.options) for q in probe.questions}
    for p in pack(rows, max_tokens=max_tokens):
        logits = head_logits(model, hidden_states(model, p)).double().cpu()
        for name, row in zip(p.example_ids, logits, strict=True):
            said[name] = max(options[name], key=lambda letter, row=row: float(row[letters[letter]]))  # type: ignore[misc]
    return [said[q.id] for q in probe.questions]


def letter_ids(template: ChatTemplate) -> dict[str, int]:
    """The token of each letter A .. F as an answer begins with it. Raises ModelError where a letter is several."""
    out = {}
    for letter in "ABCDEF":
        turns = (Message("user", ""), Message("assistant", letter))
        row = template.encode(Example(turns, id=letter, question_id=letter), max_length=1 << 30)
        taught = row.labels[row.labels != IGNORE] if isinstance(row, TokenizedExample) else np.zeros(0)
        if len(taught) != 2:  # the letter and the end of the turn
            raise ModelError(f"this tokenizer writes the letter {letter} in {len(taught) - 1} tokens, not in one")
        out[letter] = int(taught[0])
    return out


# ---- the forms -------------------------------------------------------------------------------------------------------


def _rows(file: Path) -> list[dict[str, str]]:
    try:
        with file.open(encoding="utf-8-sig", newline="") as f:
            return [{k or "": v or "" for k, v in row.items()} for row in csv.DictReader(f)]
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"cannot be read as CSV: {e}", file=file) from None


def _header(file: Path) -> list[str]:
    with file.open(encoding="utf-8-sig", errors="replace") as f:
        return f.readline().strip().split(",")


def _is_index(file: Path) -> bool:
    return _header(file)[:4] == ["suite", "subject", "file", "id"]


def _is_dev(file: Path) -> bool:
    return file.parent.name == "dev"


def _subject(file: Path) -> str:
    return re.sub(r"_(dev|val|test)$", "", file.stem)


def _wanted(indices: Sequence[Path], root: Path) -> dict[Path, set[str]]:
    """{file: ids} of an index; its file names start at the index's own folder."""
    wanted: dict[Path, set[str]] = {}
    for index in indices:
        for number, row in enumerate(_rows(index), start=2):
            file = index.parent / row["file"]
            if not file.resolve().is_relative_to(root.resolve()) or not file.is_file():
                raise DataError(f"{row['file']} is not under {root.name}", file=index, row=number)
            wanted.setdefault(file, set()).add(row["id"])
    return wanted


def _read_form(file: Path, root: Path) -> tuple[list[ProbeQuestion], int]:
    """The questions of one file, and how many rows had several right letters."""
    found, several = [], 0
    for number, row in enumerate(_rows(file)):
        question, options, answer = _of_row(row, file, number + 2)
        if len(answer) > 1 and set(answer) <= set(options):
            several += 1
            continue
        if answer not in options:
            raise DataError(f"the answer {answer!r} is none of {' '.join(options)}", file=file, row=number + 2)
        name = f"{file.relative_to(root)}:{row.get('id') or row.get('') or number}"
        found.append(ProbeQuestion(name, file.parent.parent.name, _subject(file), question, options, answer))
    return found, several


def _of_row(row: dict[str, str], file: Path, number: int) -> tuple[str, dict[str, str], str]:
    lower = {k.lower(): v for k, v in row.items()}
    if {"question", "answer", "a", "b", "c", "d"} <= lower.keys():
        options = {letter: lower[letter.lower()] for letter in "ABCDEF" if lower.get(letter.lower())}
    elif {"question", "answer", "options"} <= lower.keys():
        options = dict(_option_lines(lower["options"]))
    else:
        raise DataError(
            f"columns {', '.join(row)} are in none of the forms of C-Eval, CMMLU and CMExam", file=file, row=1
        )
    if len(options) < 2 or not lower["question"].strip():
        raise DataError(f"a question with {len(options)} options", file=file, row=number)
    return lower["question"].strip(), options, lower["answer"].strip().upper()


def _option_lines(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if match := re.match(r"\s*([A-F])[\s.、．:：]+(.*)", line):
            yield match[1], match[2].strip()
