"""A source -> a folder to train on, with an account of every row.

read -> clean -> split by cluster -> drop leaks -> weigh and limit -> write      kept + rejected = read, per source

OUT/train.jsonl dev.jsonl test.jsonl       messages with id, question_id, source, split
OUT/candidates/{train,dev,test}.jsonl      ranking lists, the source's or drawn ones; answers.jsonl holds their texts
OUT/rejects.jsonl  report.json  report.html  data_card.json
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core import Example, Split
from ..errors import DataError, ResourceError
from ..messages import say
from .candidates import ANSWERS, FOLDER, SPLITS, CandidateList, draw_candidates, write_candidates
from .card import CARD, write_card
from .clean import CleanReport, clean
from .mix import draw, read_sources, repeat
from .overview import overview
from .report import as_html, summary
from .sources import HUB, Source, read_examples, read_messages, write_conversations, write_messages
from .split import Alike, clusters, find_alike, leaking, leaks, split
from .spun import refuse_spun


@dataclass(slots=True)
class _Rows:
    """What becomes of the rows: in a split, or out with a reason. `repeated`: source number -> copies in train."""

    kept: dict[Split, list[Example]]
    rejects: list[tuple[Example, str]]
    orphans: list[str]
    repeated: Counter[int] = field(default_factory=Counter)

    def reject(self, side: Split, out: Sequence[bool], reason: str) -> None:
        rows = self.kept[side]
        self.rejects += [(e, reason) for e, is_out in zip(rows, out, strict=True) if is_out]
        self.kept[side] = [e for e, is_out in zip(rows, out, strict=True) if not is_out]

    def reasons(self) -> Counter[str]:
        return Counter(reason for _, reason in self.rejects) + Counter({"orphan": len(self.orphans)})


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

    source      a file, folder, zip or hf:owner/name (data/sources.py), or a YAML file of several (data/mix.py)
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
    source, out = source if str(source).startswith(HUB) else Path(source), Path(out)
    sources, weights = zip(*read_sources(source, on_orphan=on_orphan), strict=True)
    examples = [e for s in sources for e in s.examples]
    spun = refuse_spun(examples, source, allow=allow_spun)
    kept, cleaned = clean(examples, off=no_clean, mask_names=mask_names)
    others = {Path(a).name: read_examples(a) for a in against}
    alike = find_alike([*kept, *(e for o in others.values() for e in o)])
    kept = split(kept, dev=dev, test=test, seed=seed, alike=alike)
    orphans = [i for s in sources for i in s.orphans]
    rows = _Rows({s: [e for e in kept if e.split == s] for s in SPLITS}, list(cleaned.rejects), orphans)
    sides = [s for s in SPLITS if rows.kept[s]]
    found = {f"{s}_{n}": asdict(leaks(rows.kept[s], o, alike)) for n, o in others.items() for s in sides}
    if drop_leaks:
        held_out = [*rows.kept["dev"], *rows.kept["test"], *(e for o in others.values() for e in o)]
        rows.reject("train", leaking(rows.kept["train"], held_out, alike), "leak")
    _weigh(rows, sources, weights, limit, seed)
    if not rows.kept["train"]:
        named = ", ".join(f"{reason} {n}" for reason, n in rows.reasons().most_common())
        raise DataError(f"of {len(examples)} rows none is left to train on (out are: {named})", file=source)
    report = _report(source, sources, weights, cleaned, rows, alike, seed)
    report["against"], report["spun"] = found, spun
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / CARD).unlink(missing_ok=True)
        _write(out, rows, format)
        texts = {e.id: (e.question_id, e.answer) for e in kept}
        report |= _write_candidates(out / FOLDER, sources, rows, texts, alike, seed)
        (out / "report.html").write_text(as_html(report), encoding="utf-8")
        (out / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        write_card(out, sources, report, licence)  # last: it says that the folder is whole
    except OSError as e:
        raise ResourceError(f"cannot be written: {e.strerror}", file=out, hint="Name another --out.") from None
    return report


def _weigh(rows: _Rows, sources: Sequence[Source], weights: Sequence[float], limit: int | None, seed: int) -> None:
    """Training rows by the weights of their sources, at most `limit` of them."""
    train = rows.kept["train"]
    by_weight, by_limit = draw(_source_of(train, sources), weights, limit=limit, seed=seed)
    rows.rejects += [(e, "weight") for e, n in zip(train, by_weight, strict=True) if not n]
    rows.rejects += [(e, "limit") for e, n, m in zip(train, by_weight, by_limit, strict=True) if n and not m]
    rows.kept["train"] = repeat(train, by_limit)
    for source, n in zip(_source_of(train, sources), by_limit, strict=True):
        rows.repeated[source] += max(0, n - 1)


def _source_of(examples: Iterable[Example], sources: Sequence[Source]) -> list[int]:
    """Of several sources each id begins with its source's name."""
    place = {s.name: i for i, s in enumerate(sources)}
    return [place[e.id.split(":", 1)[0]] if len(sources) > 1 else 0 for e in examples]


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
    first, *others = summary(report)
    print(first)
    for name, count in report["rules"].items():
        if count["rows"] and name not in report["flags"]:
            print(say("data.rule", name=name, rows=count["rows"]))
    print("\n".join(others))


# ---- the account ------------------------------------------------------------------------------------------------


def _report(
    source: str | Path,
    sources: Sequence[Source],
    weights: Sequence[float],
    cleaned: CleanReport,
    rows: _Rows,
    alike: Alike,
    seed: int,
) -> dict[str, Any]:
    accounts = _accounts(sources, weights, rows)
    reasons = rows.reasons()
    sides: tuple[tuple[Split, Split], ...] = (("dev", "train"), ("test", "train"), ("test", "dev"))
    every = [e for s in SPLITS for e in rows.kept[s]]
    pairs = [(a, b) for a, b in sides if rows.kept[a] and rows.kept[b]]
    return {
        "source": sources[0].name if len(sources) == 1 else Path(source).name,
        "sources": accounts,
        "read": sum(a["read"] for a in accounts),
        "kept": sum(a["kept"] for a in accounts),
        "repaired": cleaned.repaired,
        "rejected": reasons.total(),
        "repeated": rows.repeated.total(),
        "reasons": dict(sorted(reasons.items())),
        "splits": {s: len(rows.kept[s]) for s in SPLITS},
        "official_split": all(e.split for s in sources for e in s.examples),
        "rules": cleaned.as_dict()["rules"],
        "flags": cleaned.flags,
        "digit_stops": cleaned.digit_stops,
        "leaks": {f"{a}_{b}": asdict(leaks(rows.kept[a], rows.kept[b], alike)) for a, b in pairs},
        **overview(every, clusters(every, alike)),
        "seed": seed,
    }


def _accounts(sources: Sequence[Source], weights: Sequence[float], rows: _Rows) -> list[dict[str, Any]]:
    """read = kept + rejected for each source; `repeated` are copies that its weight asked for."""
    written = Counter(_source_of((e for s in SPLITS for e in rows.kept[s]), sources))
    rejected = Counter(_source_of((e for e, _ in rows.rejects), sources))
    accounts = []
    for i, (source, weight) in enumerate(zip(sources, weights, strict=True)):
        kept, out = written[i] - rows.repeated[i], rejected[i] + len(source.orphans)
        assert kept + out == len(source.examples) + len(source.orphans), "a row vanished"
        accounts.append(
            {
                "name": source.name,
                "weight": weight,
                "read": kept + out,
                "kept": kept,
                "rejected": out,
                "repeated": rows.repeated[i],
                "ignored_files": source.ignored,
            }
        )
    return accounts


# ---- writing -----------------------------------------------------------------------------------------------------


def _write(out: Path, rows: _Rows, format: str) -> None:
    for s in SPLITS:
        write_messages(out / f"{s}.jsonl", rows.kept[s])
    if format == "conversations":
        write_conversations(out / "train.json", rows.kept["train"])
    with (out / "rejects.jsonl").open("w", encoding="utf-8") as f:
        for e, reason in rows.rejects:
            turns = [{"role": m.role, "content": m.content} for m in e.messages]
            f.write(json.dumps({"id": e.id, "reason": reason, "messages": turns}, ensure_ascii=False) + "\n")
        for identity in rows.orphans:
            f.write(json.dumps({"id": identity, "reason": "orphan"}) + "\n")


def _write_candidates(
    folder: Path,
    sources: Sequence[Source],
    rows: _Rows,
    texts: dict[str, tuple[str, str]],
    alike: Alike,
    seed: int,
) -> dict[str, Any]:
    """The sources' lists; for dev and test of a source without any, drawn ones. `texts`: what every clean row answers,
    also a training row that a limit left out. Returns questions per split, and the splits with drawn lists."""
    for name in (*(f"{s}.jsonl" for s in SPLITS), ANSWERS):  # of an earlier call
        (folder / name).unlink(missing_ok=True)
    lists: dict[Split, list[CandidateList]] = {s: [] for s in SPLITS}
    drawn: set[Split] = set()
    for s in SPLITS:
        here = rows.kept[s]
        numbers = clusters(here, alike) if s != "train" else []
        for i, source in enumerate(sources):
            if source.candidates.lists.get(s):
                lists[s] += source.candidates.lists[s]
            elif s != "train":
                own = [j for j, n in enumerate(_source_of(here, sources)) if n == i]
                made = draw_candidates([here[j] for j in own], [numbers[j] for j in own], seed=seed)
                lists[s] += made
                drawn |= {s} if made else set()
    rejected = {e.id for e, reason in rows.rejects}
    carried = {a: t for source in sources for a, t in source.candidates.texts.items() if a not in rejected}
    questions = {s: {e.question_id: e.question for e in rows.kept[s]} for s in SPLITS}
    counts = write_candidates(folder, lists, questions, carried | texts)
    return {"candidates": counts, "candidates_drawn": sorted(drawn)}
