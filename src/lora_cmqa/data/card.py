"""data_card.json: what went in and what came out, by hash. It travels into the run folder and the model card.

    {"source", "licence", "inputs": {file: sha256}, "outputs": {file: sha256}, "rows": {split: rows}}

With the run's seed the hash of train.jsonl says which row stood in which step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core import Example
from .candidates import SPLITS
from .files import DataFile, on_disk
from .sources import CARD, Source


def write_card(out: Path, sources: Sequence[Source], report: Mapping[str, Any], licence: str) -> None:
    """The card of a folder that `prepare` has just written."""
    inputs: dict[str, str] = {}
    for source in sources:
        before = f"{source.name}/" if len(sources) > 1 else ""
        inputs |= {before + name: _sha256(file) for name, file in sorted(source.files.items())}
        if not source.files:  # a dataset of a hub: its rows are what was read
            inputs[source.name] = _sha256_of_rows(source.examples)
    card = {
        "source": report["source"],
        "licence": licence,
        "inputs": inputs,
        "outputs": _outputs(out),
        "rows": report["splits"],
    }
    (out / CARD).write_text(json.dumps(card, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_card(data: str | Path, *others: str | Path) -> dict[str, Any]:
    """The card of what a run trains on: a prepared folder's own, else what can be said of a folder or a file.

    `outputs` are hashed now, so rows edited after `prepare` are told by their hash. `others`: files mixed in.
    """
    path = Path(data).absolute()
    card: dict[str, Any] = {"source": path.name, "licence": "unknown"}
    try:
        found = json.loads((path / CARD).read_text(encoding="utf-8"))
        card |= found if isinstance(found, dict) else {}
    except (OSError, ValueError):
        pass  # no folder of `prepare`: the hashes below say which rows these are
    outputs = _outputs(path)
    for other in map(Path, others):
        outputs |= _outputs(other.absolute(), before=f"{other.name}/") if other.is_dir() else _outputs(other.absolute())
    return card | {"outputs": outputs}


def _outputs(path: Path, before: str = "") -> dict[str, str]:
    files = [path / f"{s}.jsonl" for s in SPLITS] if path.is_dir() else [path]
    return {before + f.name: _sha256(on_disk(f)) for f in files if f.is_file()}


def _sha256(file: DataFile) -> str:
    digest = hashlib.sha256()
    with file.open() as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sha256_of_rows(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for e in examples:
        digest.update(json.dumps(asdict(e), ensure_ascii=False, sort_keys=True).encode())
    return digest.hexdigest()
