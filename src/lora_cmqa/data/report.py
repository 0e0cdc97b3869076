"""report.html: the account of `cmqa prepare` as one page that needs no network.

summary in words > what became of the rows > each rule > lengths > groups of like rows > samples, before and after
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..messages import language, say
from .clean import FLAGS, REPAIRS

STYLE = (
    "body{font:16px/1.6 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%;margin:1rem 0}td,th{border-bottom:1px solid #ddd;padding:.3rem .6rem;"
    "text-align:left;vertical-align:top}td.n{text-align:right}"
)
# No button and no address of a service: the page sends nothing anywhere.
PLOTLY = {"showSendToCloud": False, "plotlyServerURL": "", "displaylogo": False, "responsive": True}


_USUAL = ("README", "LICENSE", "LICENCE")  # beside any data; report.json names them too


def as_html(report: Mapping[str, Any]) -> str:
    """The page of a report.json, in the process's language: the same report gives the same bytes."""
    title = say("data.report", source=report["source"])
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        *(f"<p>{html.escape(line)}</p>" for line in summary(report)),
        *_pictures(report),
        _sources(report),
        _samples(report),
        _groups(report),
    ]
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="{language()}">{head}{"".join(parts)}</html>\n'


def summary(report: Mapping[str, Any]) -> list[str]:
    """The account in sentences, as `cmqa prepare` prints it and the page begins."""
    lines = [say("data.summary", **{k: report[k] for k in ("read", "kept", "repaired", "rejected")})]
    if report["reasons"]:
        named = say("data.and").join(f"{reason} {n}" for reason, n in report["reasons"].items())
        lines.append(say("data.reasons", reasons=named))
    if report["repeated"]:
        lines.append(say("data.repeated", rows=report["repeated"]))
    lines.append(say("data.splits", **report["splits"]))
    lines += [
        say("data.leak", pair=pair.replace("_", " / "), **found)
        for pair, found in (report["leaks"] | report["against"]).items()
    ]
    lines += [say("data.flag", name=name, rows=len(ids)) for name, ids in report["flags"].items() if ids]
    if report["outliers"]["rows"]:
        lines.append(say("data.outliers", rows=report["outliers"]["rows"]))
    ignored = [n for s in report["sources"] for n in s["ignored_files"] if not n.upper().startswith(_USUAL)]
    if ignored:
        lines.append(say("data.ignored", files=say("data.and").join(ignored[:8]) + (" …" if len(ignored) > 8 else "")))
    return lines


# ---- pictures ------------------------------------------------------------------------------------------------------


def _pictures(report: Mapping[str, Any]) -> list[str]:
    import plotly.graph_objects as go
    import plotly.io as pio

    def bars(title: str, x: Sequence[Any], y: Sequence[Any], *, across: bool = False, name: str = "") -> go.Figure:
        figure = go.Figure(go.Bar(x=y, y=x, orientation="h") if across else go.Bar(x=x, y=y, name=name))
        height = 140 + 28 * len(x) if across else 360
        return figure.update_layout(title=say(title), template="plotly_white", height=height)

    became = {say("data.kept"): report["kept"]} | report["reasons"]
    used = {name: rule["rows"] for name, rule in report["rules"].items() if rule["rows"]}
    bins = report["lengths"]
    edges = [f"{i * bins['step']}" for i in range(len(bins["answers"]) - 1)]
    edges.append(f"{len(edges) * bins['step']}+")
    by_length = bars("data.lengths", edges, bins["questions"], name=say("data.questions"))
    by_length.add_bar(x=edges, y=bins["answers"], name=say("data.answers"))
    sizes = report["clusters"]["sizes"]
    clusters = bars("data.clusters", list(sizes), list(sizes.values()))
    clusters.update_xaxes(type="category", title=say("data.cluster_size"))
    clusters.update_yaxes(type="log")
    figures = {
        "became": bars("data.became", list(became), list(became.values()), across=True),
        "rules": bars("data.rules", list(used), list(used.values()), across=True),
        "lengths": by_length,
        "clusters": clusters,
    }
    return [
        pio.to_html(figure, full_html=False, include_plotlyjs=not i, config=PLOTLY, div_id=name)
        for i, (name, figure) in enumerate(figures.items())
    ]


# ---- tables --------------------------------------------------------------------------------------------------------


def _sources(report: Mapping[str, Any]) -> str:
    if len(report["sources"]) < 2:
        return ""
    keys = ("name", "weight", "read", "kept", "rejected", "repeated")
    titles = ("source", "weight", "read", "kept", "rejected", "repeated_rows")
    return _table([say(f"data.{t}") for t in titles], ([s[k] for k in keys] for s in report["sources"]))


def _samples(report: Mapping[str, Any]) -> str:
    """Two tables: what a repair changed, and rows that a rule rejected or named."""
    kinds: dict[bool, list[list[str]]] = {True: [], False: []}
    for name, rule in report["rules"].items():
        called = f"{name} ({say('data.flagged')})" if name in FLAGS else name
        kinds[name in REPAIRS] += [[called, s["before"], s["after"]] for s in rule["samples"]]
    repaired = _table([say("data.rules"), say("data.before"), say("data.after")], kinds[True])
    others = _table([say("data.rules"), say("data.questions"), say("data.answers")], kinds[False])
    return f"<h2>{html.escape(say('data.samples'))}</h2>{repaired}{others}"


def _groups(report: Mapping[str, Any]) -> str:
    largest = report["clusters"]["largest"]
    if not largest:
        return ""
    head = [say("data.cluster_size"), "id", say("data.questions"), say("data.answers")]
    rows = ([g["questions"], " ".join(g["ids"]), g["question"], g["answer"]] for g in largest)
    return f"<h2>{html.escape(say('data.largest'))}</h2>{_table(head, rows)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        number = ' class="n"' if isinstance(value, int | float) else ""
        return f"<td{number}>{html.escape(str(value))}</td>"

    titles = "".join(f"<th>{html.escape(t)}</th>" for t in head)
    body = "".join("<tr>" + "".join(cell(v) for v in row) + "</tr>" for row in rows)
    return f"<table><tr>{titles}</tr>{body}</table>"
