"""report.json, report.md, report.html and predictions.jsonl: the same bytes for the same input, no clock in them."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..messages import language, say

_ORDER = ("nll", "content_gain", "nll_shuffled", "repetition", "length", "ended")
_LOWER_IS_BETTER = {"nll", "nll_shuffled", "repetition"}
_NEUTRAL = {"length", "ended"}
EXAMPLES_SHOWN = 8


def write_report(folder: Path, report: dict[str, Any], predictions: Sequence[dict[str, Any]]) -> None:
    """Write the four files into `folder` (made when absent)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(as_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(as_html(report, predictions), encoding="utf-8")
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as f:
        for p in predictions:
            f.write(json.dumps(p, ensure_ascii=False) + "\n")


def table_rows(report: dict[str, Any]) -> list[list[str]]:
    """[[name, base, adapter, difference, interval, p, what it says], ...] for every metric, in a fixed order."""
    rows = []
    for key in _ORDER:
        if (m := report["metrics"].get(key)) is None:
            continue
        low, high = m["ci95"]
        rows.append(
            [
                say(f"eval.{key}"),
                f"{m['base']:.3f}",
                f"{m['adapter']:.3f}",
                f"{m['difference']:+.3f}",
                f"{low:+.3f} .. {high:+.3f}",
                f"{m['p']:.4f}",
                _says(key, low, high),
            ]
        )
    return rows


def _says(key: str, low: float, high: float) -> str:
    if low <= 0 <= high:
        return say("eval.not_shown")
    if key in _NEUTRAL:
        return say("eval.more" if low > 0 else "eval.less")
    better = (high < 0) if key in _LOWER_IS_BETTER else (low > 0)
    return say("eval.better" if better else "eval.worse")


def headings() -> list[str]:
    return [say(f"eval.{k}") for k in ("metric", "base", "adapter", "difference", "interval", "p", "says")]


def verdict_line(report: dict[str, Any]) -> str:
    return say("eval.verdict", verdict=say("eval.verdict_" + report["verdict"].replace(" ", "_")), rows=report["rows"])


def print_table(report: dict[str, Any]) -> None:
    """The table and the verdict in the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    for i, heading in enumerate(headings()):
        table.add_column(heading, justify="left" if i in (0, 6) else "right")
    for row in table_rows(report):
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(verdict_line(report), highlight=False)


def as_markdown(report: dict[str, Any]) -> str:
    lines = [f"# {say('eval.title', run=report['run'], base=report['base'])}", "", verdict_line(report), ""]
    lines += ["| " + " | ".join(headings()) + " |", "|" + "---|" * 7]
    lines += ["| " + " | ".join(row) + " |" for row in table_rows(report)]
    lines += ["", say("eval.explained"), "", "```json", json.dumps(report["signature"], indent=2), "```", ""]
    return "\n".join(lines)


_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;width:100%;margin:1rem 0}th,td{border-bottom:1px solid #ddd;padding:.4rem;"
    "text-align:left;vertical-align:top}td.n{text-align:right;font-variant-numeric:tabular-nums}"
    "pre{background:#f6f6f6;padding:1rem;overflow:auto}"
)


def as_html(report: dict[str, Any], predictions: Sequence[dict[str, Any]]) -> str:
    """One self-contained page: the verdict, the differences as a picture and a table, answers side by side."""
    title = html.escape(say("eval.title", run=report["run"], base=report["base"]))
    head = "".join(f"<th>{html.escape(h)}</th>" for h in headings())
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=n' if 0 < i < 6 else ''}>{html.escape(c)}</td>" for i, c in enumerate(row))
        + "</tr>"
        for row in table_rows(report)
    )
    answers = "".join(
        f"<tr><td>{html.escape(p['question'])}</td><td>{html.escape(p['base']['text'])}</td>"
        f"<td>{html.escape(p['adapter']['text'])}</td></tr>"
        for p in predictions[:EXAMPLES_SHOWN]
    )
    columns = "".join(f"<th>{html.escape(say(k))}</th>" for k in ("eval.question", "eval.base", "eval.adapter"))
    return (
        f"<!doctype html><html lang={language()}><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{html.escape(verdict_line(report))}</p>{_picture(report)}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{html.escape(say('eval.explained'))}</p>"
        f"<table><thead><tr>{columns}</tr></thead><tbody>{answers}</tbody></table>"
        f"<pre>{html.escape(json.dumps(report['signature'], indent=2))}</pre></html>\n"
    )


def _picture(report: dict[str, Any]) -> str:
    """The loss differences with their intervals; plotly's script stands in the page, nothing is fetched."""
    import plotly.graph_objects as go

    keys = [k for k in ("nll_shuffled", "content_gain", "nll") if k in report["metrics"]]
    values = [report["metrics"][k] for k in keys]
    figure = go.Figure(
        go.Scatter(
            x=[m["difference"] for m in values],
            y=[say(f"eval.{k}") for k in keys],
            mode="markers",
            marker={"size": 10},
            error_x={
                "type": "data",
                "symmetric": False,
                "array": [m["ci95"][1] - m["difference"] for m in values],
                "arrayminus": [m["difference"] - m["ci95"][0] for m in values],
            },
        )
    )
    figure.add_vline(x=0, line_dash="dot")
    figure.update_layout(
        height=260,
        margin={"l": 10, "r": 10, "t": 10, "b": 40},
        xaxis_title=say("eval.difference"),
        template="simple_white",
    )
    return figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        div_id="differences",
        config={"showSendToCloud": False, "plotlyServerURL": "", "displaylogo": False},
    )
