"""Any known source -> Examples; one function a format.

    cMQA / cMedQA folder     questions.csv | question.csv, answers.csv | answer.csv       read_cmqa
                             *_candidates.txt, splits.csv beside them                     read_splits, candidates.py
    messages JSONL           {"messages": [{"role", "content"}], "id", ...} a line        read_messages       (ours)
    conversations JSON       [{"id", "conversations": [{"from", "value"}]}], ShareGPT too read_conversations
    Alpaca JSON or JSONL     {"instruction", "input", "output", "system", "history"}      read_alpaca
    question,answer CSV      department,title,ask,answer and the like; JSON rows too      read_qa
    hf:owner/name            a Hugging Face dataset of rows like these                    read_dataset

A folder or a zip may hold several files of these forms. Text is UTF-8 with or without BOM, or GB18030, found by
looking. Every row becomes an Example or an error that says where; nothing is skipped in silence.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..core import Example, Message, Role, Split
from ..errors import DataError
from ..hub import fetch_dataset
from .candidates import FOLDER, SPLITS, Candidates, read_cmqa_candidates, read_prepared_candidates
from .files import DataFile, data_files, find, on_disk
from .tables import csv_columns, csv_dicts, json_rows

HUB = "hf:"
CARD = "data_card.json"

_QUESTION_FILES = ("questions.csv", "question.csv")
_ANSWER_FILES = ("answers.csv", "answer.csv")
_SPLIT_FILE = "splits.csv"
_QUESTION_ID = ("question_id", "que_id", "questionid")
_ANSWER_ID = ("ans_id", "answer_id", "answerid")
_SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "dev": "dev",
    "valid": "dev",
    "validation": "dev",
    "val": "dev",
    "test": "test",
}
_ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
}


@dataclass(slots=True)
class Source:
    """What one place brought.

    examples  one a row; `.split` is set where the place brings a split of its own
    orphans   ids of answers left out because their question is missing (on_orphan="drop")
    files     name -> what was read, for the data card; `ignored` what lay beside it
    candidates  its ranking lists
    """

    name: str
    examples: list[Example]
    orphans: list[str] = field(default_factory=list)
    candidates: Candidates = field(default_factory=Candidates)
    files: dict[str, DataFile] = field(default_factory=dict)
    ignored: list[str] = field(default_factory=list)


def read_examples(source: str | Path, *, on_orphan: Literal["error", "drop"] = "error") -> list[Example]:
    """The rows of a file, folder or zip of a known form (see the module's table), or of a dataset hf:owner/name.

    on_orphan  an answer whose question is missing: an error, or left out (prepare counts it)
    Raises DataError: nothing there, an unknown form, a missing column, a bad row (with its line).
    """
    return read_source(source, on_orphan=on_orphan).examples


def read_source(source: str | Path, *, on_orphan: Literal["error", "drop"] = "error") -> Source:
    """`read_examples`, and what else is to be told about the place. A folder made by `prepare` gives its own rows."""
    if str(source).startswith(HUB):
        return Source(str(source), read_dataset(str(source)))
    path = Path(os.path.abspath(source))  # so that "." has a name
    if re.fullmatch(r"\.z\d\d", path.suffix.lower()):
        path = path.with_suffix(".zip")
    if is_prepared(path):
        return _read_prepared(path)
    found = data_files(path, hint=_near_name(Path(source)))
    if is_cmqa(path):
        return _read_cmqa_source(path, found, on_orphan)
    if path.is_file() and found[0].name == str(path):
        return Source(path.name, _read_file(found[0]), files={path.name: found[0]})
    return _read_several(path, found)


def _read_prepared(folder: Path) -> Source:
    files = {f"{s}.jsonl": on_disk(folder / f"{s}.jsonl") for s in SPLITS if (folder / f"{s}.jsonl").is_file()}
    examples = [e for f in files.values() for e in read_messages(f, missing_ok=True)]
    return Source(folder.name, examples, candidates=read_prepared_candidates(folder / FOLDER), files=files)


def _read_cmqa_source(path: Path, found: Sequence[DataFile], on_orphan: Literal["error", "drop"]) -> Source:
    examples, orphans = read_cmqa(path, on_orphan=on_orphan)
    candidates = read_cmqa_candidates(path)
    official = read_splits(path, candidates)
    if official:
        examples = [replace(e, split=official.get(e.question_id, "train")) for e in examples]
    names = (*_QUESTION_FILES, *_ANSWER_FILES, _SPLIT_FILE)
    used = {_name(f, path): f for f in found if f.base in names or "_candidates." in f.base}
    ignored = sorted({_name(f, path) for f in found} - used.keys())
    return Source(path.name, examples, orphans, candidates, used, ignored)


def _read_several(path: Path, found: Sequence[DataFile]) -> Source:
    """A folder or a zip of files of the other forms; a file named train, dev or test is that split."""
    used = {_name(f, path): f for f in found if f.base.endswith(_ENDINGS)}
    if not used:
        raise DataError("no CSV, JSON or JSON lines file is here", file=path, hint=_FORMS)
    alone = next((f.base for f in used.values() if f.base in _QUESTION_FILES), None)
    if alone:
        raise DataError(f"{alone} is here without its answers.csv", file=path, hint="Both come with one release.")
    examples = [e for name, f in used.items() for e in _read_file(f, prefix=f"{name}:")]
    sides = {name: side for name in used if (side := _split_of(Path(name).stem))}
    ignored = sorted({_name(f, path) for f in found} - used.keys())
    return Source(path.name, _with_splits(examples, sides), files=used, ignored=ignored)


def is_prepared(path: Path) -> bool:
    """A folder that `prepare` wrote: its rows keep their ids and splits."""
    return (path / "train.jsonl").is_file() and (path / CARD).is_file()


def is_cmqa(path: Path) -> bool:
    """A folder (or a zip, or a folder of zips as cMedQA2 comes) with an answer file of the cMQA layout."""
    if not (path.is_dir() or path.suffix.lower() in (".zip", ".z01")) or is_prepared(path):
        return False
    return any(f.base in _ANSWER_FILES for f in data_files(path))


_ENDINGS = (".csv", ".json", ".jsonl", ".ndjson")
_FORMS = (
    "Known: a cMQA folder, conversations JSON (ShareGPT too), messages JSONL, Alpaca JSON, rows with question and "
    "answer columns."
)


def _near_name(path: Path) -> str | None:
    """A hub name is said so: a mistyped path must not go over the network."""
    is_hub_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path)) and not path.parent.is_dir()
    return f"A Hugging Face dataset is named {HUB}{path}" if is_hub_name else None


def _name(file: DataFile, root: Path) -> str:
    """`file` as seen from the folder or zip it was found in."""
    return file.name.removeprefix(str(root)).lstrip("/\\:")


def _split_of(stem: str) -> Split | None:
    return _SPLIT_NAMES.get(re.split(r"[-_.]", stem.lower())[0])


def _with_splits(examples: list[Example], by_source: Mapping[str, Split]) -> list[Example]:
    """Rows that name no split take their file's; files that all are training files say nothing about a split."""
    if len(set(by_source.values())) < 2:
        return examples
    return [e if e.split else replace(e, split=by_source.get(e.source)) for e in examples]


# ---- cMQA / cMedQA -----------------------------------------------------------------------------------------------


def read_cmqa(folder: Path, *, on_orphan: Literal["error", "drop"] = "error") -> tuple[list[Example], list[str]]:
    """One Example an answer, and the ids of answers left out because their question is missing (on_orphan="drop")."""
    question_file, answer_file = _needed(folder, _QUESTION_FILES), _needed(folder, _ANSWER_FILES)
    questions: dict[str, str] = {}
    for line, row in csv_columns(question_file, needed=(_QUESTION_ID, ("content",))):
        qid = row[0]
        if qid in questions and questions[qid] != row[1]:
            raise DataError(f"question_id {qid} stands twice with different texts", file=question_file.name, row=line)
        questions[qid] = row[1]
    examples: list[Example] = []
    orphans: list[tuple[int, str, str]] = []
    seen: set[str] = set()
    for line, (aid, qid, content) in csv_columns(answer_file, needed=(_ANSWER_ID, _QUESTION_ID, ("content",))):
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


def read_splits(folder: Path, candidates: Candidates | None = None) -> dict[str, Split]:
    """question_id -> split, from splits.csv, else from the candidate files (dev, test; the rest is train); else {}."""
    file = find(folder, (_SPLIT_FILE,))
    if file is None:
        lists = (candidates or read_cmqa_candidates(folder)).lists
        return {c.question_id: s for s in SPLITS[1:] for c in lists.get(s, ())}
    out: dict[str, Split] = {}
    for line, (qid, split) in csv_columns(file, needed=(_QUESTION_ID, ("split",))):
        if split not in SPLITS:
            raise DataError(f"{split!r} is no split (train, dev, test)", file=file.name, row=line, field="split")
        out[qid] = split  # type: ignore[assignment]
    return out


def _needed(folder: Path, names: Sequence[str]) -> DataFile:
    file = find(folder, names)
    if file is None:
        raise DataError(f"neither {' nor '.join(names)} is here", file=folder)
    return file


# ---- rows that say what they are ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where a row stands: its file as a person knows it, its line, and what its number is prefixed with as an id."""

    file: str
    line: int
    prefix: str = ""

    def error(self, message: str, *, field: str | None = None, hint: str | None = None) -> DataError:
        return DataError(message, file=self.file, row=self.line, field=field, hint=hint)

    def id_of(self, row: Mapping[str, Any], default: str | None = None) -> str:
        """The row's own id, else `default`, else its line."""
        return f"{self.prefix}{row['id'] if row.get('id') not in (None, '') else default or self.line}"


_QUESTION = ("ask", "question", "query", "问题")
_ANSWER = ("answer", "response", "回答", "答案")
_TITLE = ("title", "标题")
Row = Mapping[str, Any]


def messages_row(row: Row, place: Place) -> Example:
    """{"messages": [{"role", "content"}], "id", "question_id", "source", "split"}; all but messages may be absent."""
    turns = _turns(row["messages"], "role", "content", place)
    split = row.get("split")
    if split not in (None, "train", "dev", "test"):
        raise place.error(f"{split!r} is no split (train, dev, test)", field="split")
    identity = place.id_of(row)
    question = f"{place.prefix}{row['question_id']}" if row.get("question_id") else identity
    return Example(turns, id=identity, question_id=question, source=row.get("source") or "", split=split)


def conversations_row(row: Row, place: Place) -> Example:
    """The seed's {"id", "conversations": [{"from": "user" | "assistant", "value"}]}; ShareGPT's human, gpt, system."""
    turns = _turns(row["conversations"], "from", "value", place)
    identity = place.id_of(row, default=f"identity_{place.line - 1}")
    question = f"{place.prefix}{row['question_id']}" if row.get("question_id") else identity
    return Example(_system(row) + turns, id=identity, question_id=question)


def alpaca_row(row: Row, place: Place) -> Example:
    """{"instruction", "input", "output"}, and of later sets "system" and "history": [[question, answer]]."""
    ask, more = _text(row, "instruction", place), _text(row, "input", place)
    earlier = []
    for pair in row.get("history") or ():
        if not isinstance(pair, Sequence) or len(pair) != 2 or not all(isinstance(t, str) for t in pair):
            raise place.error("a pair of question and answer is expected", field="history")
        earlier += [Message("user", pair[0]), Message("assistant", pair[1])]
    last = (Message("user", f"{ask}\n{more}" if more else ask), Message("assistant", _text(row, "output", place)))
    identity = place.id_of(row)
    return Example((*_system(row), *earlier, *last), id=identity, question_id=identity)


def qa_row(row: Row, place: Place) -> Example:
    """A question and an answer column; a title stands before the question where it says more."""
    ask, title = _text(row, _first_of(row, _QUESTION), place), _text(row, _first_of(row, _TITLE), place)
    answer = _text(row, _first_of(row, _ANSWER), place)
    question = ask if title in ("", ask) or title in ask else f"{title}\n{ask}"
    identity = place.id_of(row)
    return Example((Message("user", question), Message("assistant", answer)), id=identity, question_id=identity)


RowReader = Callable[[Row, Place], Example]


def row_reader(row: Row, place: Place) -> RowReader:
    """The reader of the form that a first row has. Raises DataError for no known form."""
    if "messages" in row:
        return messages_row
    if "conversations" in row:
        return conversations_row
    if "instruction" in row and "output" in row:
        return alpaca_row
    missing = [w for ways in (_QUESTION, _ANSWER) for w in [ways[:2]] if not _first_of(row, ways)]
    if not missing:
        return qa_row
    keys = ", ".join(str(k) for k in list(row)[:8])
    if len(missing) == 1:
        raise place.error(f"no column {' or '.join(missing[0])}; it has {keys}", field=missing[0][0])
    raise place.error(f"rows with the keys {keys} are no form known here", hint=_FORMS)


def _first_of(row: Row, names: Sequence[str]) -> str:
    return next((n for n in names if n in row), "")


def _text(row: Row, key: str, place: Place) -> str:
    """ "" for an absent or empty value: `clean` rejects what is empty, and says so."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise place.error(f"text is expected, found {type(value).__name__}", field=key)
    return value


def _system(row: Row) -> tuple[Message, ...]:
    text = row.get("system")
    return (Message("system", text),) if isinstance(text, str) and text.strip() else ()


def _turns(rows: Any, role_key: str, text_key: str, place: Place) -> tuple[Message, ...]:
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        raise place.error("a list of turns is expected")
    turns = []
    for turn in rows:
        if not isinstance(turn, Mapping) or not isinstance(turn.get(text_key), str):
            raise place.error(f"a turn has no text under {text_key!r}", field=text_key)
        role = _ROLES.get(str(turn.get(role_key)).lower())
        if role is None:
            raise place.error(f"{turn.get(role_key)!r} is no role (user, assistant, system)")
        turns.append(Message(role, turn[text_key]))
    return tuple(turns)


# ---- files of such rows --------------------------------------------------------------------------------------------


def read_messages(file: Path | DataFile, *, missing_ok: bool = False) -> list[Example]:
    """Our JSONL: OpenAI messages plus id, question_id, source, split (all but messages may be absent).

    missing_ok  no file, or an empty one as `prepare` writes for a split without rows, gives []
    """
    file = _opened(file)
    if missing_ok and not (Path(file.name).is_file() and Path(file.name).stat().st_size):
        return []
    return _read_file(file, messages_row, needed="messages")


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


def read_conversations(file: Path | DataFile) -> list[Example]:
    """The seed's list of {"id", "conversations"}; ShareGPT's too."""
    return _read_file(_opened(file), conversations_row, needed="conversations")


def write_conversations(file: Path, examples: Iterable[Example]) -> None:
    """The inverse of `read_conversations`, in the seed's form."""
    rows = [{"id": e.id, "conversations": [{"from": m.role, "value": m.content} for m in e.messages]} for e in examples]
    file.write_text(json.dumps(rows, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_alpaca(file: Path | DataFile) -> list[Example]:
    """instruction, input (may be absent or empty), output; JSON or, in spite of the name, JSON lines."""
    return _read_file(_opened(file), alpaca_row, needed="instruction")


def read_qa(file: Path | DataFile) -> list[Example]:
    """department,title,ask,answer and the like: CSV, JSON or JSON lines."""
    return _read_file(_opened(file), qa_row)


def read_dataset(name: str) -> list[Example]:
    """The rows of hf:owner/name, hf:owner/name:config or hf:owner/name@revision, downloaded on first use.

    Raises DataError: the `datasets` package is missing, no such dataset, no access, rows of no known form.
    """
    splits = fetch_dataset(name.removeprefix(HUB))
    examples: list[Example] = []
    for split, rows in splits.items():
        examples += _convert(enumerate(rows, start=1), name, source=split, prefix=f"{split}:")
    return _with_splits(examples, {s: side for s in splits if (side := _split_of(s))})


def _opened(file: Path | DataFile) -> DataFile:
    return on_disk(file) if isinstance(file, Path) else file


def _read_file(
    file: DataFile, reader: RowReader | None = None, *, prefix: str = "", needed: str | None = None
) -> list[Example]:
    """The rows of one file; without `reader`, of the form its first row has. A row's source is the file's name."""
    if file.base.endswith(".csv"):
        rows = csv_dicts(file)
    elif file.base.endswith(_ENDINGS):
        rows = json_rows(file)
    else:
        ending = Path(file.base).suffix or "a file without ending"
        raise DataError(f"{ending} is no form known here", file=file.name, hint=_FORMS)
    source = prefix.removesuffix(":") or Path(file.name).name
    return _convert(rows, file.name, reader, source=source, prefix=prefix, needed=needed)


def _convert(
    rows: Iterator[tuple[int, Any]],
    file: str,
    reader: RowReader | None = None,
    *,
    source: str,
    prefix: str = "",
    needed: str | None = None,
) -> list[Example]:
    examples = []
    for line, row in rows:
        place = Place(file, line, prefix)
        if not isinstance(row, Mapping):
            raise place.error("an object a row is expected", hint=_FORMS)
        reader = reader or row_reader(row, Place(file, 1, prefix))  # a CSV's columns stand in line 1
        if needed and needed not in row:
            raise place.error(f"the key {needed!r} is missing", field=needed)
        try:
            example = reader(row, place)
        except KeyError as e:
            raise place.error(f"the key {e.args[0]!r} is missing", field=e.args[0]) from None
        examples.append(example if example.source else replace(example, source=source))
    return examples
