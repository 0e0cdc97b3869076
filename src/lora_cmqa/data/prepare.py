"""A source -> a folder to train on, with an account of every row.

read -> clean -> split by cluster -> write          kept + rejected = read, and report.json says so

OUT/train.jsonl dev.jsonl test.jsonl       messages with id, question_id, source, split
OUT/candidates/{train,dev,test}.jsonl      ranking lists, where the source has them; answers.jsonl holds their texts
OUT/rejects.jsonl  report.json  report.html  data_card.json
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..core import Example, Split
from ..errors import DataError, ResourceError
from ..messages import say
from .clean import CleanReport, clean
from .report import as_html
from .sources import (
    is_cmqa,
    read_candidates,
    read_cmqa,
    read_examples,
    read_messages,
    read_splits,
    write_conversations,
    write_messages,
)
from .split import Alike, find_alike, leaked_ids, leaks, split
from .spun import refuse_spun

SPLITS: tuple[Split, ...] = ("train", "dev", "test")


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    seed: int = 42,
    format: Literal["messages", "conversations"] = "messages",
    limit: int | None = None,
    on_orphan: Literal["error", "drop"] = "error",
    no_clean: Sequence[str] = (),
    mask_names: bool = False,
    dev: float = 0.1,
    test: float = 0.1,
    against: Sequence[str | Path] = (),
    drop_leaks: bool = False,
    allow_spun: bool = False,
    licence: str = "unknown",
) -> dict[str, Any]:
    """Prepare `source` into the folder `out` and return the report (the content of OUT/report.json).

    format      conversations also writes the training rows as the seed's train.json
    limit       at most this many training rows, drawn by `seed`; the others are rejected with the reason "limit"
    no_clean    cleaning rules to switch off (data/clean.py names them)
    mask_names  names after a surname pattern become [姓名]; off by default, for the pattern is sometimes wrong
    dev, test   shares of the rows where the source brings no split of its own
    against     files or folders (a benchmark, say) whose near-duplicates among the kept rows are counted
    drop_leaks  training rows with a near-duplicate in dev, test or `against` are rejected with the reason "leak"
    allow_spun  go on although the words of a machine-reworded set were found (data/spun.py)

    Raises DataError for a source that cannot be read or leaves no row, ResourceError when `out` cannot be written.
    """
    source, out = Path(source), Path(out)
    rejects: list[tuple[Example, str]] = []
    orphans: list[str] = []
    is_layout = is_cmqa(source)
    if is_layout:
        examples, orphans = read_cmqa(source, on_orphan=on_orphan)
    else:
        examples = read_examples(source)
    read = len(examples) + len(orphans)
    spun = refuse_spun(examples, source, allow=allow_spun)
    kept, cleaned = clean(examples, off=no_clean, mask_names=mask_names)
    rejects += cleaned.rejects
    official = read_splits(source) if is_layout else {}
    if official:
        kept = [replace(e, split=official.get(e.question_id, "train")) for e in kept]
    others = {Path(a).name: read_examples(a) for a in against}
    alike = find_alike([*kept, *(e for o in others.values() for e in o)])
    kept = split(kept, dev=dev, test=test, seed=seed, alike=alike)
    rows: dict[Split, list[Example]] = {s: [e for e in kept if e.split == s] for s in SPLITS}
    found = {f"{s}_{name}": asdict(leaks(rows[s], o, alike)) for name, o in others.items() for s in SPLITS if rows[s]}
    if drop_leaks:
        leaking = leaked_ids(
            rows["train"], [*rows["dev"], *rows["test"], *(e for o in others.values() for e in o)], alike
        )
        rejects += [(e, "leak") for e in rows["train"] if e.id in leaking]
        rows["train"] = [e for e in rows["train"] if e.id not in leaking]
    if limit is not None and len(rows["train"]) > limit:
        order = np.random.Generator(np.random.PCG64(seed)).permutation(len(rows["train"]))
        chosen = set(order[:limit].tolist())
        rejects += [(e, "limit") for i, e in enumerate(rows["train"]) if i not in chosen]
        rows["train"] = [e for i, e in enumerate(rows["train"]) if i in chosen]
    if not rows["train"]:
        raise DataError(f"of {read} rows none is left to train on", file=source, hint="report.json names the reasons.")
    report = _report(source, read, cleaned, rows, rejects, orphans, alike, official=bool(official), seed=seed)
    report["against"], report["spun"] = found, spun
    try:
        out.mkdir(parents=True, exist_ok=True)
        _write(out, rows, rejects, orphans, format)
        if is_layout:
            report["candidates"] = _write_candidates(out / "candidates", source, kept)
        _write_card(out, source, report, licence)
        (out / "report.html").write_text(as_html(report, rows), encoding="utf-8")
        (out / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    except OSError as e:
        raise ResourceError(f"cannot be written: {e.strerror}", file=out, hint="Name another --out.") from None
    return report


def load_split(path: str | Path, name: str, *, dev_fraction: float = 0.0, seed: int = 42) -> list[Example]:
    """The rows of one split: of a folder made by `prepare`, of our JSONL, or of the seed's conversations JSON.

    A single file is all training rows, unless its rows name splits or `dev_fraction` cuts a dev set off it by cluster.
    Raises DataError where there is nothing to read.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "train.jsonl").is_file():
            raise DataError("no train.jsonl here", file=path, hint=f"cmqa prepare {path} --out DIR, then --data DIR.")
        return read_messages(path / f"{name}.jsonl", missing_ok=True)
    examples = read_examples(path)
    if any(e.split for e in examples):
        return [e for e in examples if (e.split or "train") == name]
    if dev_fraction > 0:
        return [e for e in split(examples, dev=dev_fraction, test=0.0, seed=seed) if e.split == name]
    return examples if name == "train" else []


def print_summary(report: dict[str, Any]) -> None:
    """What a person wants to know after `cmqa prepare`."""
    print(say("data.summary", **{k: report[k] for k in ("read", "kept", "repaired", "rejected")}))
    print(say("data.splits", **report["splits"]))
    for name, count in report["rules"].items():
        if count["rows"]:
            print(say("data.flag" if name in report["flags"] else "data.rule", name=name, rows=count["rows"]))
    for pair, found in (report["leaks"] | report["against"]).items():
        print(say("data.leak", pair=pair.replace("_", " / "), **found))


# ---- the account ------------------------------------------------------------------------------------------------


def _report(
    source: Path,
    read: int,
    cleaned: CleanReport,
    rows: dict[Split, list[Example]],
    rejects: list[tuple[Example, str]],
    orphans: list[str],
    alike: Alike,
    *,
    official: bool,
    seed: int,
) -> dict[str, Any]:
    kept = sum(len(r) for r in rows.values())
    reasons = Counter(reason for _, reason in rejects)
    reasons.update({"orphan": len(orphans)} if orphans else {})
    assert kept + reasons.total() == read, "a row vanished"
    sides: tuple[tuple[Split, Split], ...] = (("dev", "train"), ("test", "train"), ("test", "dev"))
    pairs = [(a, b) for a, b in sides if rows[a] and rows[b]]
    return {
        "source": source.name,
        "read": read,
        "kept": kept,
        "repaired": cleaned.repaired,
        "rejected": reasons.total(),
        "reasons": dict(sorted(reasons.items())),
        "splits": {s: len(rows[s]) for s in SPLITS},
        "official_split": official,
        "rules": cleaned.as_dict()["rules"],
        "flags": cleaned.flags,
        "digit_stops": cleaned.digit_stops,
        "leaks": {f"{a}_{b}": asdict(leaks(rows[a], rows[b], alike)) for a, b in pairs},
        "seed": seed,
    }


def _write(
    out: Path,
    rows: dict[Split, list[Example]],
    rejects: list[tuple[Example, str]],
    orphans: list[str],
    format: str,
) -> None:
    for s in SPLITS:
        write_messages(out / f"{s}.jsonl", rows[s])
    if format == "conversations":
        write_conversations(out / "train.json", rows["train"])
    with (out / "rejects.jsonl").open("w", encoding="utf-8") as f:
        for e, reason in rejects:
            turns = [{"role": m.role, "content": m.content} for m in e.messages]
            f.write(json.dumps({"id": e.id, "reason": reason, "messages": turns}, ensure_ascii=False) + "\n")
        for identity in orphans:
            f.write(json.dumps({"id": identity, "reason": "orphan"}) + "\n")


def _write_candidates(folder: Path, source: Path, kept: Sequence[Example]) -> dict[str, int]:
    """Ranking lists over the kept rows; an answer that was rejected leaves every list. Returns questions per split."""
    texts = {e.id: e for e in kept}
    questions = {e.question_id: e.question for e in kept}
    counts: dict[str, int] = {}
    used: set[str] = set()
    for s in SPLITS:
        lists = [c for c in read_candidates(source, s) if c.question_id in questions]
        if not lists:
            continue
        folder.mkdir(exist_ok=True)
        with (folder / f"{s}.jsonl").open("w", encoding="utf-8") as f:
            written = 0
            for c in lists:
                here = [(a, y) for a, y in zip(c.candidates, c.labels, strict=True) if a in texts]
                if not any(y for _, y in here):
                    continue
                used.update(a for a, _ in here)
                written += 1
                row = {
                    "question_id": c.question_id,
                    "question": questions[c.question_id],
                    "candidates": [a for a, _ in here],
                    "labels": [y for _, y in here],
                }
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
        counts[s] = written
    if counts:
        with (folder / "answers.jsonl").open("w", encoding="utf-8") as f:
            for a in sorted(used):
                e = texts[a]
                row = {"ans_id": a, "question_id": e.question_id, "content": e.answer}
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
    return counts


def _write_card(out: Path, source: Path, report: dict[str, Any], licence: str) -> None:
    """data_card.json: what went in and what came out, by hash; it travels into the run folder and the model card."""
    inputs = sorted(p for p in source.iterdir() if p.is_file()) if source.is_dir() else [source]
    card = {
        "source": source.name,
        "licence": licence,
        "inputs": {p.name: _sha256(p) for p in inputs},
        "outputs": {f"{s}.jsonl": _sha256(out / f"{s}.jsonl") for s in SPLITS},
        "rows": report["splits"],
    }
    (out / "data_card.json").write_text(json.dumps(card, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _sha256(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
