"""Any known file -> Examples; one function a format.

    cMQA / cMedQA folder     questions.csv | question.csv, answers.csv | answer.csv       read_cmqa
                             *_candidates.txt, splits.csv beside them                     read_candidates, read_splits
    conversations JSON       [{"id", "conversations": [{"from", "value"}]}]               read_conversations
    messages JSONL           {"messages": [{"role", "content"}], "id", ...} a line        read_messages       (ours)
    Alpaca JSON or JSONL     {"instruction", "input", "output"}                           read_alpaca
    question,answer CSV      department,title,ask,answer and the like                     read_qa_csv

Text is UTF-8 with or without BOM, or GB18030, found by looking. Every row becomes an Example or an error that says
where; nothing is skipped in silence.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

from ..core import Example, Message, Role, Split
from ..errors import DataError
from .files import DataFile, data_files, lines, on_disk, open_text

MAX_FIELD = 1 << 20  # characters; a longer field is a broken quote or no text at all

_QUESTION_FILES = ("questions.csv", "question.csv")
_ANSWER_FILES = ("answers.csv", "answer.csv")
_QUESTION_ID = ("question_id", "que_id", "questionid")
_ANSWER_ID = ("ans_id", "answer_id", "answerid")
_ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}


@dataclass(frozen=True, slots=True)
class CandidateList:
    """One question of a ranking task: candidate answer ids, and 1 for those that answer it."""

    question_id: str
    candidates: tuple[str, ...]
    labels: tuple[int, ...]


def read_examples(source: str | Path, *, on_orphan: Literal["error", "drop"] = "error") -> list[Example]:
    """Read a file or folder of a known form (see the module's table), found by looking into it.

    on_orphan  an answer whose question is missing: an error, or left out (prepare counts it)
    Raises DataError: nothing there, an unknown form, a missing column, a bad row (with its line).
    """
    path = Path(source)
    if is_cmqa(path):
        return read_cmqa(path, on_orphan=on_orphan)[0]
    if path.suffix.lower() == ".zip" and path.is_file():
        raise DataError("no questions.csv with answers.csv in this zip", file=path, hint="Unpack it and name the file.")
    if path.is_dir():
        if (path / "train.jsonl").is_file():
            return [e for s in ("train", "dev", "test") for e in read_messages(path / f"{s}.jsonl", missing_ok=True)]
        raise DataError(
            "neither questions.csv with answers.csv nor train.jsonl is here",
            file=path,
            hint="Name a cMQA / cMedQA folder, a folder made by `cmqa prepare`, or a single file.",
        )
    if not path.is_file():
        raise DataError("no such file or folder", file=path)
    if path.suffix.lower() == ".csv":
        return read_qa_csv(path)
    if path.suffix.lower() not in (".json", ".jsonl", ".ndjson"):
        raise DataError(f"{path.suffix or 'a file without ending'} is no form known here", file=path, hint=_FORMS)
    first = next(iter(_json_rows(path)), (0, None))[1]
    if not isinstance(first, dict):
        raise DataError("an object a row is expected", file=path, hint=_FORMS)
    if "messages" in first:
        return read_messages(path)
    if "conversations" in first:
        return read_conversations(path)
    if "instruction" in first and "output" in first:
        return read_alpaca(path)
    raise DataError(f"rows with the keys {', '.join(sorted(first)[:8])} are no form known here", file=path, hint=_FORMS)


_FORMS = (
    "Known: a cMQA folder, conversations JSON, messages JSONL, Alpaca JSON, a CSV with question and answer columns."
)


def is_cmqa(path: Path) -> bool:
    """A folder (or a zip, or a folder of zips as cMedQA2 comes) with an answer file of the cMQA layout."""
    if not (path.is_dir() or path.suffix.lower() in (".zip", ".z01")) or (path / "train.jsonl").is_file():
        return False
    return any(f.base in _ANSWER_FILES for f in data_files(path))


# ---- cMQA / cMedQA -----------------------------------------------------------------------------------------------


def read_cmqa(folder: Path, *, on_orphan: Literal["error", "drop"] = "error") -> tuple[list[Example], list[str]]:
    """One Example an answer, and the ids of answers left out because their question is missing (on_orphan="drop")."""
    question_file, answer_file = _find(folder, _QUESTION_FILES), _find(folder, _ANSWER_FILES)
    questions: dict[str, str] = {}
    for line, row in _csv_rows(question_file, needed=(_QUESTION_ID, ("content",))):
        qid = row[0]
        if qid in questions and questions[qid] != row[1]:
            raise DataError(f"question_id {qid} stands twice with different texts", file=question_file.name, row=line)
        questions[qid] = row[1]
    examples: list[Example] = []
    orphans: list[tuple[int, str, str]] = []
    seen: set[str] = set()
    for line, (aid, qid, content) in _csv_rows(answer_file, needed=(_ANSWER_ID, _QUESTION_ID, ("content",))):
        if aid in seen:
            raise DataError(f"ans_id {aid} stands twice", file=answer_file.name, row=line)
        seen.add(aid)
        if qid not in questions:
            orphans.append((line, aid, qid))
            continue
        turns = (Message("user", questions[qid]), Message("assistant", content))
        examples.append(Example(turns, id=aid, question_id=qid, source=answer_file.base))
    if orphans and on_orphan == "error":
        line, _, qid = orphans[0]
        raise DataError(
            f"question_id {qid} is not in {question_file.base} ({len(orphans)} rows like this, of {len(seen)})",
            file=answer_file.name,
            row=line,
            hint="Drop them with --on-orphan drop, or check that both files come from the same release.",
        )
    return examples, [aid for _, aid, _ in orphans]


def read_splits(folder: Path) -> dict[str, Split]:
    """question_id -> split, from splits.csv, else from the candidate files (dev, test; the rest is train); else {}."""
    file = _find(folder, ("splits.csv",), needed=False)
    if file is not None:
        out: dict[str, Split] = {}
        for line, (qid, split) in _csv_rows(file, needed=(_QUESTION_ID, ("split",))):
            if split not in ("train", "dev", "test"):
                raise DataError(f"{split!r} is no split (train, dev, test)", file=file.name, row=line, field="split")
            out[qid] = split  # type: ignore[assignment]
        return out
    named: dict[str, Split] = {}
    for split in ("dev", "test"):
        for c in read_candidates(folder, split):
            named[c.question_id] = split  # type: ignore[assignment]
    return named


def read_candidates(folder: Path, split: str) -> list[CandidateList]:
    """The ranking lists of a split: question_id,ans_id,cnt,label rows, or question_id,pos_ans_id,neg_ans_id for train.

    Without a file: []. Raises DataError for a header narrower than its rows (old cMedQA v1 files name 3 of 4 columns).
    """
    file = _find(folder, (f"{split}_candidates.txt", f"{split}_candidates.csv"), needed=False)
    if file is None:
        return []
    rows = _raw_rows(file)
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


@overload
def _find(folder: Path, names: Sequence[str]) -> DataFile: ...
@overload
def _find(folder: Path, names: Sequence[str], *, needed: bool) -> DataFile | None: ...
def _find(folder: Path, names: Sequence[str], *, needed: bool = True) -> DataFile | None:
    """The first of `names` in a folder or zip; the one least deep where it stands in several folders."""
    files = sorted(data_files(folder), key=lambda f: f.name.count("/"))
    found = next((f for n in names for f in files if f.base == n), None)
    if found is None and needed:
        raise DataError(f"neither {' nor '.join(names)} is here", file=folder)
    return found


# ---- JSON forms --------------------------------------------------------------------------------------------------


def read_messages(file: Path, *, missing_ok: bool = False) -> list[Example]:
    """Our JSONL: OpenAI messages plus id, question_id, source, split (all but messages may be absent)."""
    if missing_ok and not file.is_file():
        return []
    examples = []
    for line, row in _json_rows(file):
        turns = _turns(_get(row, "messages", file, line), "role", "content", file, line)
        identity = str(row.get("id", line))
        split = row.get("split")
        if split not in (None, "train", "dev", "test"):
            raise DataError(f"{split!r} is no split (train, dev, test)", file=file, row=line, field="split")
        examples.append(
            Example(
                turns,
                id=identity,
                question_id=str(row.get("question_id", identity)),
                source=row.get("source") or file.name,
                split=split,
            )
        )
    return examples


def write_messages(file: Path, examples: Iterable[Example]) -> None:
    """The inverse of `read_messages`."""
    with file.open("w", encoding="utf-8") as f:
        for e in examples:
            row = {
                "messages": [{"role": m.role, "content": m.content} for m in e.messages],
                "id": e.id,
                "question_id": e.question_id,
                "source": e.source,
                "split": e.split,
            }
            f.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_conversations(file: Path) -> list[Example]:
    """The seed's list of {"id", "conversations": [{"from": "user" | "assistant", "value"}]}; ShareGPT's too."""
    examples = []
    for line, row in _json_rows(file):
        identity = str(row.get("id", f"identity_{line - 1}"))
        turns = _turns(_get(row, "conversations", file, line), "from", "value", file, line)
        question = str(row.get("question_id", identity))
        examples.append(Example(turns, id=identity, question_id=question, source=file.name))
    return examples


def write_conversations(file: Path, examples: Iterable[Example]) -> None:
    """The inverse of `read_conversations`, in the seed's form."""
    rows = [{"id": e.id, "conversations": [{"from": m.role, "value": m.content} for m in e.messages]} for e in examples]
    file.write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_alpaca(file: Path) -> list[Example]:
    """instruction, input (may be absent or empty), output; JSON or, in spite of the name, JSON lines."""
    examples = []
    for line, row in _json_rows(file):
        ask, more = _get(row, "instruction", file, line), row.get("input") or ""
        turns = (
            Message("user", f"{ask}\n{more}" if more else ask),
            Message("assistant", _get(row, "output", file, line)),
        )
        examples.append(Example(turns, id=str(line), question_id=str(line), source=file.name))
    return examples


def read_qa_csv(file: Path) -> list[Example]:
    """A CSV with a question and an answer column; a title stands before the question where it says more."""
    asks, answers = ("ask", "question", "query", "问题"), ("answer", "response", "回答", "答案")
    examples = []
    for line, (title, ask, answer) in _csv_rows(
        on_disk(file), needed=(("title", "标题"), asks, answers), optional=(0,)
    ):
        question = ask if title in ("", ask) or title in ask else f"{title}\n{ask}"
        turns = (Message("user", question), Message("assistant", answer))
        examples.append(Example(turns, id=str(line), question_id=str(line), source=file.name))
    return examples


def _turns(rows: Any, role_key: str, text_key: str, file: Path, line: int) -> tuple[Message, ...]:
    if not isinstance(rows, list) or not rows:
        raise DataError("a list of turns is expected", file=file, row=line)
    turns = []
    for turn in rows:
        if not isinstance(turn, dict) or not isinstance(turn.get(text_key), str):
            raise DataError(f"a turn has no text under {text_key!r}", file=file, row=line, field=text_key)
        role = _ROLES.get(str(turn.get(role_key)).lower())
        if role is None:
            raise DataError(f"{turn.get(role_key)!r} is no role (user, assistant, system)", file=file, row=line)
        turns.append(Message(role, turn[text_key]))
    return tuple(turns)


def _get(row: Any, key: str, file: Path, line: int) -> Any:
    if not isinstance(row, dict) or key not in row:
        raise DataError(f"the key {key!r} is missing", file=file, row=line, field=key)
    return row[key]


def _json_rows(file: Path) -> Iterator[tuple[int, Any]]:
    """(place, row) of a JSON list, where place counts rows, or of JSON lines, where it is the line."""
    with open_text(on_disk(file)) as stream:
        text = stream.read()
    if not text.strip():
        raise DataError("the file is empty", file=file)
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as e:
            raise DataError(f"not whole JSON: {e}", file=file, row=getattr(e, "lineno", None)) from None
        if not rows:
            raise DataError("the list is empty", file=file)
        yield from enumerate(rows, start=1)
        return
    for line, content in enumerate(text.splitlines(), start=1):
        if content.strip():
            try:
                yield line, json.loads(content)
            except ValueError as e:
                raise DataError(f"not JSON: {e}", file=file, row=line) from None


# ---- text and CSV ------------------------------------------------------------------------------------------------


def _raw_rows(file: DataFile) -> Iterator[tuple[int, list[str]]]:
    """(line, fields); the line is where the row ends, as the csv module counts it."""
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(lines(file), strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as e:
        raise DataError(f"not whole CSV: {e}", file=file.name, row=reader.line_num) from None


def _csv_rows(
    file: DataFile, *, needed: Sequence[Sequence[str]], optional: Sequence[int] = ()
) -> Iterator[tuple[int, list[str]]]:
    """(line, the needed fields in order). Each of `needed` lists the names a column may have."""
    rows = _raw_rows(file)
    _, header = next(rows, (1, []))
    if not header:
        raise DataError("the file is empty", file=file.name)
    names = [h.strip().lower() for h in header]
    places: list[int | None] = []
    for i, ways in enumerate(needed):
        place = next((names.index(w) for w in ways if w in names), None)
        if place is None and i not in optional:
            raise DataError(
                f"no column {' or '.join(ways)}; it has {', '.join(header)}", file=file.name, row=1, field=ways[0]
            )
        places.append(place)
    empty = True
    for line, row in rows:
        empty = False
        if len(row) != len(header):
            raise DataError(f"{len(row)} fields where the header has {len(header)}", file=file.name, row=line)
        yield line, [row[p] if p is not None else "" for p in places]
    if empty:
        raise DataError("a header and no row", file=file.name)
