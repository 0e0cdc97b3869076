"""A large data set's tokens, made once and then memory-mapped.

    rows, tokenizer, template, settings -> key -> FOLDER/key/  input_ids.npy  labels.npy  rows.json  manifest.json

    input_ids   5 6 7 8 2 | 5 9 4 2 | ...        int32 [tokens of all rows]
    starts      0           5         9          where each row begins (rows.json, with ids and the account)

The key is a hash of all that decides a token: another row, tokenizer or setting is another entry. An entry appears by
rename, each file's sha256 stands in its manifest and is checked before use, and what is damaged is made anew. The
entries used longest ago go when the folder holds more than its limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from ..core import Example, TokenizedExample
from ..messages import say
from .files import sha256_of
from .template import ChatTemplate, EncodeReport, Reject, encode_all

FORM = 1  # of the files; counts up when they or the encoding change
SMALLEST = 4096  # rows: fewer are encoded in about a second
MANIFEST, _STALE = "manifest.json", 24 * 3600  # seconds after which a temporary folder is a killed process's


class TokenRows(Sequence[TokenizedExample]):
    """Rows over two flat arrays; a row is a view, made when it is asked for."""

    def __init__(
        self,
        input_ids: np.ndarray,
        labels: np.ndarray,
        starts: Sequence[int],
        ids: Sequence[str],
        question_ids: Sequence[str],
    ) -> None:
        self.input_ids, self.labels, self.starts = input_ids, labels, starts
        self.ids, self.question_ids = ids, question_ids

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        i = index % len(self)
        own = slice(self.starts[i], self.starts[i + 1])
        return TokenizedExample(self.input_ids[own], self.labels[own], self.ids[i], self.question_ids[i])


def encode_cached(
    examples: Sequence[Example],
    template: ChatTemplate,
    *,
    folder: Path,
    max_bytes: int,
    max_length: int,
    on_too_long: Literal["drop", "shorten", "error"] = "drop",
    system: str | None = None,
) -> tuple[Sequence[TokenizedExample], EncodeReport]:
    """`encode_all`, from `folder` where these rows were encoded before.

    max_bytes   of all entries together; a larger one, and everything under 0, is not kept
    Fewer than SMALLEST rows are encoded each time. A folder that cannot be written is said, and costs only time.
    """
    settings = {"max_length": max_length, "on_too_long": on_too_long, "system": system}
    key = _key(examples, template, settings) if max_bytes > 0 and len(examples) >= SMALLEST else None
    if key is not None and (found := _load(folder / key)) is not None:
        return found
    rows, report = encode_all(examples, template, max_length=max_length, on_too_long=on_too_long, system=system)
    if key is None or not rows:
        return rows, report
    try:
        _write(folder / key, rows, report, max_bytes)
    except OSError as e:
        print(say("data.cache_unwritable", folder=folder, reason=e.strerror or e), file=sys.stderr)
        return rows, report
    return _load(folder / key) or (rows, report)


# ---- the key -------------------------------------------------------------------------------------------------------


def _key(examples: Sequence[Example], template: ChatTemplate, settings: dict[str, Any]) -> str | None:
    """A hash of rows, tokenizer, template, settings and the libraries that encode; None for a tokenizer that cannot
    say what it is."""
    backend = getattr(template.tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    backend.no_truncation()  # as `encode_all` sets them
    backend.no_padding()
    digest = hashlib.sha256()
    libraries = [f"{name} {version(name)}" for name in ("tokenizers", "transformers")]
    for part in (FORM, libraries, settings, template.jinja, type(template.tokenizer).__name__):
        digest.update(json.dumps(part, sort_keys=True).encode())
    digest.update(backend.to_str().encode())
    for e in examples:
        digest.update(repr((e.id, e.question_id, e.source, [(m.role, m.content) for m in e.messages])).encode())
    return digest.hexdigest()[:32]


# ---- one entry -----------------------------------------------------------------------------------------------------


def _write(entry: Path, rows: Sequence[TokenizedExample], report: EncodeReport, max_bytes: int) -> None:
    """The inverse of `_load`. Nothing is written that would not stay within `max_bytes`."""
    if 8 * report.tokens > max_bytes:
        return
    entry.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{entry.name}.", dir=entry.parent))
    try:
        np.save(temporary / "input_ids.npy", np.concatenate([r.input_ids for r in rows]))
        np.save(temporary / "labels.npy", np.concatenate([r.labels for r in rows]))
        about = {
            "starts": np.cumsum([0, *(len(r) for r in rows)]).tolist(),
            "ids": [r.id for r in rows],
            "question_ids": [r.question_id for r in rows],
            "report": dataclasses.asdict(report),
        }
        (temporary / "rows.json").write_text(json.dumps(about), encoding="utf-8")
        sums = {p.name: sha256_of(p) for p in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(sums), encoding="utf-8")
        for file in temporary.iterdir():
            with file.open("rb") as f:
                os.fsync(f.fileno())
        try:
            temporary.rename(entry)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):  # another process was first; what it wrote is the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _prune(entry.parent, max_bytes, keep=entry.name)


def _load(entry: Path) -> tuple[TokenRows, EncodeReport] | None:
    """The entry, None where there is none. A damaged one is said and removed."""
    if not entry.is_dir():
        return None
    try:
        sums = json.loads((entry / MANIFEST).read_text(encoding="utf-8"))
        differing = [name for name, digest in sums.items() if sha256_of(entry / name) != digest]
        if differing or set(sums) != {"input_ids.npy", "labels.npy", "rows.json"}:
            raise ValueError(f"{', '.join(differing) or MANIFEST} differs from what was written")
        about = json.loads((entry / "rows.json").read_text(encoding="utf-8"))
        input_ids, labels = (
            np.load(entry / f"{n}.npy", mmap_mode="r").view(np.ndarray) for n in ("input_ids", "labels")
        )
        report = about["report"] | {"rejects": [Reject(**r) for r in about["report"]["rejects"]]}
        rows = TokenRows(input_ids, labels, about["starts"], about["ids"], about["question_ids"])
        with contextlib.suppress(OSError):
            os.utime(entry)  # used now: the last to go
        return rows, EncodeReport(**report)
    except (OSError, ValueError, KeyError, TypeError) as e:
        print(say("data.cache_damaged", entry=entry, reason=e), file=sys.stderr)
        shutil.rmtree(entry, ignore_errors=True)
        return None


def _prune(folder: Path, max_bytes: int, *, keep: str) -> None:
    """Oldest entries out until the rest fits; what a killed process left half written goes after a day."""
    entries = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):
            used = path.stat().st_mtime
            if path.name.startswith("."):
                if time.time() - used > _STALE:
                    shutil.rmtree(path)
            elif path.is_dir():
                entries.append((path.name == keep, used, sum(f.stat().st_size for f in path.iterdir()), path))
    total = sum(size for _, _, size, _ in entries)
    for kept, _, size, path in sorted(entries, key=lambda e: e[:2]):
        if total <= max_bytes or kept:
            break
        shutil.rmtree(path, ignore_errors=True)
        total -= size
