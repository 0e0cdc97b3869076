"""Several sources in one file, with weights.

    sources:
      - path: cmqa                # a path is seen from this file's folder; hf:owner/name is a dataset
      - path: alpaca.json
        weight: 0.5               # half of its training rows, drawn by seed
      - path: clinic/department.csv
        name: clinic              # stands before its ids; default: the file's name
        weight: 2                 # each training row twice

A weight touches training rows only: dev and test measure, so they stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..core import Example
from ..errors import DataError
from .sources import HUB, Source, read_source

MAX_WEIGHT = 100.0
ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Part:
    """One entry of the file. `weight` is how often a training row is written, on average."""

    path: str
    name: str = ""
    weight: float = 1.0


def read_sources(source: str | Path, *, on_orphan: Literal["error", "drop"] = "error") -> list[tuple[Source, float]]:
    """One source, or those of a YAML file, each with its weight. Of several, ids and question ids get `name:` before
    them, so that two files' row 1 are two rows."""
    if not str(source).lower().endswith(ENDINGS):
        return [(read_source(source, on_orphan=on_orphan), 1.0)]
    file = Path(source)
    read = []
    for part in read_parts(file):
        place = part.path if part.path.startswith(HUB) else file.parent / Path(part.path).expanduser()
        read.append((_named(read_source(place, on_orphan=on_orphan), part.name), part.weight))
    return read


def read_parts(file: Path) -> list[Part]:
    """The entries of the YAML file. Raises DataError: not readable, an unknown key, a bad weight, a name used twice."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError("no such file", file=file) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise DataError(f"not a readable YAML file: {str(e).splitlines()[0]}", file=file) from None
    entries = content.get("sources") if isinstance(content, dict) and list(content) == ["sources"] else None
    if not isinstance(entries, list) or not entries:
        raise DataError("a list under `sources:` is expected, and nothing else", file=file, hint=_EXAMPLE)
    parts = [_part(entry, i, file) for i, entry in enumerate(entries, start=1)]
    names = [p.name for p in parts]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise DataError(f"two sources are called {name!r}", file=file, hint="Give one of them another `name:`.")
    return parts


_EXAMPLE = "sources:\n    - path: cmqa\n    - path: alpaca.json\n      weight: 0.5"
_KEYS = tuple(f.name for f in fields(Part))


def _part(entry: Any, number: int, file: Path) -> Part:
    where = f"sources[{number}]"
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        raise DataError("an entry with a `path:` is expected", file=file, field=where, hint=_EXAMPLE)
    for key in entry:
        if key not in _KEYS:
            near = get_close_matches(str(key), _KEYS, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Known: {', '.join(_KEYS)}."
            raise DataError(f"unknown key {key!r}", file=file, field=where, hint=hint)
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
        raise DataError(f"weight {weight!r} must be a number above 0, at most {MAX_WEIGHT:g}", file=file, field=where)
    name = str(entry.get("name") or Path(entry["path"].removeprefix(HUB)).stem)
    if ":" in name:
        raise DataError(f"the name {name!r} holds a colon", file=file, field=where, hint="Give it a `name:` without.")
    return Part(entry["path"], name, float(weight))


def _named(source: Source, name: str) -> Source:
    before = f"{name}:"
    return replace(
        source,
        name=name,
        examples=[replace(e, id=before + e.id, question_id=before + e.question_id) for e in source.examples],
        orphans=[before + i for i in source.orphans],
        candidates=source.candidates.prefixed(before),
    )


# ---- weights -------------------------------------------------------------------------------------------------------


def draw(
    source_of: Sequence[int], weights: Sequence[float], *, limit: int | None, seed: int
) -> tuple[list[int], list[int]]:
    """How often each training row is written: by the weight of its source, and then under `limit` rows in all.

    source_of  0    0    1    1    1        weights (2.5, 0.6)
    copies     3    2    1    0    1        whole copies first, the rest is drawn by seed; a row of 0 is rejected
    """
    sources = np.array(source_of, dtype=np.int64)
    copies = np.zeros(len(sources), dtype=np.int64)
    for source, weight in enumerate(weights):
        rows = np.flatnonzero(sources == source)
        whole = int(weight)
        copies[rows] = whole
        generator = np.random.Generator(np.random.PCG64([seed, 2, source]))
        copies[generator.permutation(rows)[: round((weight - whole) * len(rows))]] += 1
    if limit is None or copies.sum() <= limit:
        return copies.tolist(), copies.tolist()
    every = np.repeat(np.arange(len(copies)), copies)
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(every))
    return copies.tolist(), np.bincount(every[order[:limit]], minlength=len(copies)).tolist()


def repeat(examples: Sequence[Example], copies: Sequence[int]) -> list[Example]:
    """Each row as often as `copies` says; the second one of row a is a#2."""
    written = [e for e, n in zip(examples, copies, strict=True) if n]
    for k in range(2, max(copies, default=0) + 1):
        written += [replace(e, id=f"{e.id}#{k}") for e, n in zip(examples, copies, strict=True) if n >= k]
    return written


def is_copy(id: str, of: str) -> bool:
    """Whether `repeat` would give row `of`'s copy this id."""
    head, _, number = id.rpartition("#")
    return head == of and number.isdecimal()
