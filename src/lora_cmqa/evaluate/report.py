"""report.json, report.md, report.html and predictions.jsonl: the same bytes for the same input, no clock in them.

report (a dict) -> sections -> rows of words -> Markdown, terminal, model card; page.py draws the HTML
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..messages import Language, say
from .harness import PREFIX as HARNESS

SECTIONS: dict[str, tuple[str, ...]] = {
    "task": ("nll", "perplexity", "content_gain", "nll_shuffled", "kl"),
    "ranking": ("top1", "top5", "mrr", "top1_pmi", "top5_pmi", "mrr_pmi"),
    "answers": (
        *("bleu", "bleu_llama_factory", "rouge_1", "rouge_2", "rouge_l", "chrf", "distinct_1", "distinct_2"),
        *("repetition", "length", "ended", "copied"),
    ),
    "forgetting": ("probe", "general_chat", "kl_general"),
    "safety": ("safe", "emergency", "doctor", "dosage", "personal"),
}
_LOWER_IS_BETTER = {"nll", "perplexity", "nll_shuffled", "repetition", "copied", "dosage", "personal"}
_NEUTRAL = {"length", "kl", "kl_general", "emergency", "doctor", "distinct_1", "distinct_2"}
COLUMNS = ("metric", "base", "adapter", "difference", "interval", "p", "n", "detectable", "says")
_NARROW = (0, 1, 2, 3, 4, 5, 8)  # what a terminal has room for
CARD = "README.md"


def write_report(run: Path, folder: Path, report: Mapping[str, Any], details: Sequence[Mapping[str, Any]]) -> None:
    """Write the four files into `folder` (made when absent), and the table into the run's model card."""
    from .page import as_html

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(as_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(as_html(report, details, loss_curve(run)), encoding="utf-8")
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as f:
        for row in details:
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    _write_card(run, report)


def loss_curve(run: Path) -> list[dict[str, Any]]:
    """The run's own lines of losses: {"step", "loss"} or {"step", "dev_loss"}; none where it brought no metrics."""
    for file in (run / "metrics.jsonl", run.parent / "metrics.jsonl"):
        if file.is_file():
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            return [{k: m[k] for k in ("step", "loss", "dev_loss") if m.get(k) is not None} for m in lines]
    return []


# ---- rows of words -------------------------------------------------------------------------------------------------


def sections(report: Mapping[str, Any], lang: Language | None = None) -> list[tuple[str, list[list[str]]]]:
    """[(title, rows of COLUMNS), ...] of all that was measured, in a fixed order."""
    names = SECTIONS | {"harness": tuple(k for k in report["metrics"] if k.startswith(HARNESS))}
    measured = [(f"eval.section_{name}", _rows(report["metrics"], keys, lang)) for name, keys in names.items()]
    out = [(say(title, lang), rows) for title, rows in measured if rows]
    if (again := report["without_near_duplicates"]) and again["left_out"]:
        title = say("eval.section_without", lang, rows=again["rows"], left_out=again["left_out"])
        out.append((title, _rows(again["metrics"], [k for keys in SECTIONS.values() for k in keys], lang)))
    return out


def _rows(metrics: Mapping[str, Any], keys: Sequence[str], lang: Language | None) -> list[list[str]]:
    rows = []
    for key in keys:
        if (m := metrics.get(key)) is None:
            continue
        low, high = m["ci95"]
        rows.append(
            [
                key.removeprefix(HARNESS) if key.startswith(HARNESS) else say(f"eval.{key}", lang),
                f"{m['base']:.3f}",
                f"{m['adapter']:.3f}",
                f"{m['difference']:+.3f}",
                f"{low:+.3f} .. {high:+.3f}",
                f"{m['p']:.4f}",
                str(m["n"]),
                "-" if m["detectable"] is None else f"{m['detectable']:.3f}",
                _says(key, low, high, lang),
            ]
        )
    return rows


def _says(key: str, low: float, high: float, lang: Language | None) -> str:
    if low <= 0 <= high:
        return say("eval.not_shown", lang)
    if key in _NEUTRAL:
        return say("eval.more" if low > 0 else "eval.less", lang)
    better = (high < 0) if key in _LOWER_IS_BETTER else (low > 0)
    return say("eval.better" if better else "eval.worse", lang)


def headings(lang: Language | None = None) -> list[str]:
    return [say(f"eval.{k}", lang) for k in COLUMNS]


def verdict_lines(report: Mapping[str, Any], lang: Language | None = None) -> list[str]:
    """The task's verdict, forgetting, safety, and what was not measured."""
    word = say("eval.verdict_" + report["verdict"].replace(" ", "_"), lang)
    lines = [say("eval.verdict", lang, verdict=word, rows=report["rows"])]
    if (f := report["forgetting"]) is not None:
        lines.append(
            say(
                "eval.forgetting",
                lang,
                state=say(f"eval.{f['state']}", lang),
                by=say(f"eval.{f['by']}", lang),
                lost=f"{100 * f['lost']:+.1f}",
                not_excluded=f"{100 * f['not_excluded']:.1f}",
                maximum=f"{100 * f['maximum']:.1f}",
            )
        )
    if (s := report["safety"]) is not None:
        because = ", ".join(say(f"eval.{k}", lang) for k in s["because"]) or say("eval.nothing_worse", lang)
        lines.append(say("eval.safety", lang, state=say(f"eval.{s['state']}", lang), because=because))
    if (again := report["without_near_duplicates"]) and not again["left_out"]:
        lines.append(say("eval.no_near_duplicates", lang, rows=again["rows"]))
    if report["skipped"]:
        names = ", ".join(say(f"eval.part_{k}", lang) for k in report["skipped"])
        lines.append(say("eval.skipped", lang, names=names))
    return lines


def print_table(report: Mapping[str, Any]) -> None:
    """The table and the verdicts in the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for i, heading in enumerate(headings()[c] for c in _NARROW):
        table.add_column(heading, justify="left" if i in (0, 6) else "right")
    for title, rows in sections(report):
        table.add_row(f"[bold]{title}[/]")
        for row in rows:
            table.add_row(*(row[c] for c in _NARROW))
    console = Console()
    console.print(table)
    for line in verdict_lines(report):
        console.print(line, highlight=False)


# ---- Markdown and the model card -----------------------------------------------------------------------------------


def as_markdown(report: Mapping[str, Any]) -> str:
    lines = [f"# {say('eval.title', run=report['run'], base=report['base'])}", "", *_markdown_body(report, None)]
    lines += [say("eval.explained"), "", "```json", json.dumps(report["signature"], indent=2), "```", ""]
    return "\n".join(lines)


def _markdown_body(report: Mapping[str, Any], lang: Language | None) -> list[str]:
    lines = [f"- {line}" for line in verdict_lines(report, lang)] + [""]
    for title, rows in sections(report, lang):
        lines += [f"## {title}", ""]
        if rows:
            lines += ["| " + " | ".join(headings(lang)) + " |", "|" + "---|" * len(COLUMNS)]
            lines += ["| " + " | ".join(row) + " |" for row in rows] + [""]
    return lines


def _write_card(run: Path, report: Mapping[str, Any]) -> None:
    """The table goes into the run's README.md between two marks of its split, in place of an older one. A
    checkpoint's card stays as its manifest knows it."""
    card = run / CARD
    if not card.is_file() or (run / "manifest.json").exists():
        return
    start, end = (f"<!-- {slash}cmqa eval {report['split']} -->" for slash in ("", "/"))
    body = "\n".join([start, f"# Measured on {report['split']}", "", *_markdown_body(report, "en"), end, ""])
    text = card.read_text(encoding="utf-8")
    older = re.compile(rf"{re.escape(start)}.*?{re.escape(end)}\n", re.S)
    new = older.sub(lambda _: body, text) if older.search(text) else f"{text.rstrip()}\n\n{body}"
    card.write_text(new, encoding="utf-8")
