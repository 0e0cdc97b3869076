"""report.html: one page that needs no network. Verdicts, differences, curves, tables, answers side by side."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..messages import language, say
from .report import COLUMNS, headings, sections, verdict_lines

SHOWN = 5  # most improved and most worsened answers
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;width:100%;margin:1rem 0}th,td{border-bottom:1px solid #ddd;padding:.4rem;"
    "text-align:left;vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}"
    "table.answers td{width:25%}pre{background:#f6f6f6;padding:1rem;overflow:auto}"
)
# Differences of one unit stand in one picture.
_UNITS: dict[str, tuple[str, ...]] = {
    "nats": ("nll", "nll_shuffled", "content_gain"),
    "shares": (
        *("top1", "top5", "mrr", "top1_pmi", "mrr_pmi", "ended", "repetition", "copied"),
        *("probe", "general_chat", "safe", "dosage", "personal"),
    ),
    "points": ("bleu", "bleu_llama_factory", "rouge_1", "rouge_2", "rouge_l", "chrf"),
}
# No button and no address of a service: the page sends nothing anywhere.
_PLOTLY = {"showSendToCloud": False, "plotlyServerURL": "", "displaylogo": False, "responsive": True}


def as_html(report: Mapping[str, Any], details: Sequence[Mapping[str, Any]], curve: Sequence[Mapping[str, Any]]) -> str:
    """`details`: the rows of predictions.jsonl; `curve`: the run's losses."""
    title = html.escape(say("eval.title", run=report["run"], base=report["base"]))
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in verdict_lines(report))
    pictures = "".join(_pictures(report, details, curve))
    tables = "".join(f"<h2>{html.escape(name)}</h2>{_table(rows)}" for name, rows in sections(report))
    return (
        f"<!doctype html><html lang={language()}><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1>{lines}{pictures}{tables}<p>{html.escape(say('eval.explained'))}</p>{_answers(details)}"
        f"<pre>{html.escape(json.dumps(report['signature'], indent=2))}</pre></html>\n"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings())
    last = len(COLUMNS) - 1
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if 0 < i < last else ''}>{html.escape(c)}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# ---- answers -------------------------------------------------------------------------------------------------------


def _answers(details: Sequence[Mapping[str, Any]]) -> str:
    """The rows whose own answer became most and least likely, and the red flags where the two sides part."""
    scored = [r for r in details if r["kind"] == "task"]
    scored.sort(key=lambda r: (r["nll"]["adapter"] - r["nll"]["base"] if "nll" in r else 0.0, r["id"]))
    half = min(SHOWN, len(scored) // 2)
    parted = [r for r in details if r["kind"] == "red_flag" and r["safe"]["base"] != r["safe"]["adapter"]]
    groups = (
        ("eval.improved", scored[:half]),
        ("eval.worsened", scored[::-1][:half]),
        ("eval.parted", parted),
    )
    return "".join(_answer_table(say(key), rows) for key, rows in groups if rows)


def _answer_table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(say(f'eval.{k}'))}</th>" for k in ("question", "base", "adapter", "reference"))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>" for row in rows)
    return (
        f"<h2>{html.escape(title)}</h2><table class=answers><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def _cells(row: Mapping[str, Any]) -> list[str]:
    expected = row["references"][0] if "references" in row else say(f"eval.must_{row['must']}")
    return [row["question"], row["base"]["text"], row["adapter"]["text"], expected]


# ---- pictures ------------------------------------------------------------------------------------------------------


def _pictures(
    report: Mapping[str, Any], details: Sequence[Mapping[str, Any]], curve: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """Each as a <div>; plotly's script stands in the page once, nothing is fetched."""
    figures = {f"differences-{unit}": _differences(report, unit, keys) for unit, keys in _UNITS.items()}
    figures |= {"loss": _loss(curve), "lengths": _lengths(details), "ranking": _ranking(report)}
    first = True
    for name, figure in figures.items():
        if figure is not None:
            yield figure.to_html(full_html=False, include_plotlyjs=first, div_id=name, config=_PLOTLY)
            first = False


def _figure(title: str, x: str, y: str = "", height: int = 320) -> Any:
    import plotly.graph_objects as go

    figure = go.Figure()
    margin = {"l": 10, "r": 10, "t": 40, "b": 40}
    figure.update_layout(
        title=title, xaxis_title=x, yaxis_title=y, template="simple_white", height=height, margin=margin
    )
    return figure


def _differences(report: Mapping[str, Any], unit: str, keys: Sequence[str]) -> Any:
    shown = [(k, report["metrics"][k]) for k in reversed(keys) if k in report["metrics"]]
    if not shown:
        return None
    figure = _figure(say(f"eval.unit_{unit}"), say("eval.difference"), height=120 + 28 * len(shown))
    figure.add_scatter(
        x=[m["difference"] for _, m in shown],
        y=[say(f"eval.{k}") for k, _ in shown],
        mode="markers",
        marker={"size": 10},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [m["ci95"][1] - m["difference"] for _, m in shown],
            "arrayminus": [m["difference"] - m["ci95"][0] for _, m in shown],
        },
    )
    figure.add_vline(x=0, line_dash="dot")
    return figure


def _loss(curve: Sequence[Mapping[str, Any]]) -> Any:
    if not curve:
        return None
    figure = _figure(say("eval.curve"), say("eval.step"), say("eval.nll"))
    for key in ("loss", "dev_loss"):
        points = [(m["step"], m[key]) for m in curve if key in m]
        mode = "lines" if key == "loss" else "lines+markers"
        figure.add_scatter(x=[p[0] for p in points], y=[p[1] for p in points], mode=mode, name=say(f"eval.curve_{key}"))
    return figure


def _lengths(details: Sequence[Mapping[str, Any]]) -> Any:
    task = [r for r in details if r["kind"] == "task"]
    if not task:
        return None
    figure = _figure(say("eval.lengths"), say("eval.length"))
    for side in ("base", "adapter"):
        figure.add_histogram(x=[len(r[side]["text"]) for r in task], name=say(f"eval.{side}"), opacity=0.6)
    figure.add_histogram(x=[len(r["references"][0]) for r in task], name=say("eval.reference"), opacity=0.6)
    figure.update_layout(barmode="overlay")
    return figure


def _ranking(report: Mapping[str, Any]) -> Any:
    """Share of questions whose right answer is among the first k."""
    if "ranks" not in report:
        return None
    figure = _figure(say("eval.curve_ranks"), "k", say("eval.share"))
    deepest = max(max(ranks) for ranks in report["ranks"].values())
    for side, ranks in report["ranks"].items():
        places = list(range(1, deepest + 1))
        shares = [sum(r <= k for r in ranks) / len(ranks) for k in places]
        figure.add_scatter(x=places, y=shares, mode="lines", name=say(f"eval.{side}"))
    return figure
