"""Files -> rows, in bounded memory: CSV with its header, a JSON list, JSON lines.

Each row comes with its place: the line where it ends (CSV, JSON lines), or its number (a JSON list).
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ..errors import DataError
from .files import MAX_LINE, DataFile, lines, lines_of, open_text

MAX_FIELD = 1 << 20  # characters; a longer field is a broken quote or no text at all
_CHUNK = 1 << 20  # characters

# ---- CSV -----------------------------------------------------------------------------------------------------------


def csv_fields(file: DataFile) -> Iterator[tuple[int, list[str]]]:
    """(line, fields); the line is where the row ends, as the csv module counts it."""
    csv.field_size_limit(MAX_FIELD)
    reader = csv.reader(lines(file), strict=True)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as e:
        raise DataError(f"not whole CSV: {e}", file=file.name, row=reader.line_num) from None


def csv_columns(
    file: DataFile, *, needed: Sequence[Sequence[str]], optional: Sequence[int] = ()
) -> Iterator[tuple[int, list[str]]]:
    """(line, the needed fields in order). Each of `needed` lists the names a column may have."""
    rows = csv_fields(file)
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


def csv_dicts(file: DataFile) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, {column: field}), column names trimmed and in lower case."""
    rows = csv_fields(file)
    _, header = next(rows, (1, []))
    names = [h.strip().lower() for h in header]
    empty = True
    for line, row in rows:
        empty = False
        if len(row) != len(names):
            raise DataError(f"{len(row)} fields where the header has {len(names)}", file=file.name, row=line)
        yield line, dict(zip(names, row, strict=True))
    if empty:
        raise DataError("a header and no row", file=file.name)


# ---- JSON ----------------------------------------------------------------------------------------------------------


def json_rows(file: DataFile) -> Iterator[tuple[int, Any]]:
    """(place, row) of a JSON list, or of JSON lines. Raises DataError for what is no JSON, and for a row of more than
    MAX_LINE characters before it is held."""
    with open_text(file) as text:
        head = ""
        while not head.strip():
            if not (head := text.read(_CHUNK)):
                raise DataError("the file is empty", file=file.name)
        if head.lstrip().startswith("["):
            yield from enumerate(_json_list(file.name, head, text.read), start=1)
            return
        text.seek(0)
        for line, content in enumerate(lines_of(text, file.name), start=1):
            if content.strip():
                try:
                    yield line, json.loads(content)
                except (ValueError, RecursionError) as e:
                    raise DataError(
                        f"not JSON: {e}",
                        file=file.name,
                        row=line,
                        hint="JSON is read as one list of rows, or as one row a line.",
                    ) from None


_SPACE = re.compile(r"\s*")


def _json_list(file: str, head: str, read: Callable[[int], str]) -> Iterator[Any]:
    """The rows of `[row, row, ...]`, each decoded when it has come in whole.

    buffer  [{"a": 1}, {"a": 2}, {"a": 3        at: the third row is not whole yet, so what stands before it is let
                                 ^at            go, a chunk is read behind it, and it is tried again
    """
    decode = json.JSONDecoder().raw_decode
    buffer, at, line = head, head.index("[") + 1, 1  # line: where the buffer begins

    def broken(what: str, place: int) -> DataError:
        return DataError(f"not whole JSON: {what}", file=file, row=line + buffer.count("\n", 0, place))

    def more() -> bool:
        nonlocal buffer, at, line
        line += buffer.count("\n", 0, at)
        chunk = read(_CHUNK)
        buffer, at = buffer[at:] + chunk, 0
        return bool(chunk)

    def sign(expected: str) -> str:
        nonlocal at
        while True:
            at = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]
            if at < len(buffer):
                return buffer[at]
            if not more():
                raise broken(f"it ends where {expected} is expected", at)

    def row() -> Any:
        nonlocal at
        while True:
            try:
                value, end = decode(buffer, at)
                what, place = "", end
            except ValueError as e:
                what, place = getattr(e, "msg", str(e)), getattr(e, "pos", at)
            except RecursionError:
                raise broken("it is nested too deep", at) from None
            if not what and end < len(buffer):  # at the buffer's very end a number might go on
                at = end
                return value
            if len(buffer) - at > MAX_LINE:
                raise broken(f"{what or 'no end'} (a row of more than {MAX_LINE >> 20} million characters?)", place)
            if not more():
                raise broken(what or "it ends inside the list", place)

    empty = True
    while sign("a row or ]") != "]":
        if not empty:
            if buffer[at] != ",":
                raise broken(f"a comma or ] is expected after a row, found {buffer[at]!r}", at)
            at += 1
            sign("a row")
        yield row()
        empty = False
    if empty:
        raise DataError("the list is empty", file=file)
    at += 1
    while True:
        at = _SPACE.match(buffer, at).end()  # type: ignore[union-attr]
        if at < len(buffer):
            raise broken("more text after the list's end", at)
        if not more():
            return
