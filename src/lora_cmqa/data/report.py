"""report.html: the account of `cmqa prepare` as one page that needs no network."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from ..core import Example
from ..messages import language, say

STYLE = (
    "body{font:16px/1.6 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ddd;padding:.3rem .6rem;text-align:left;"
    "vertical-align:top}td.n{text-align:right}"
)
# No button and no address of a service: the page sends nothing anywhere.
PLOTLY = {"showSendToCloud": False, "plotlyServerURL": "", "displaylogo": False, "responsive": True}


def as_html(report: Mapping[str, Any], rows: Mapping[Any, Sequence[Example]]) -> str:
    """The page, in the process's language. `rows` are the kept rows by split; their lengths are in characters."""
    import plotly.graph_objects as go
    import plotly.io as pio

    title = say("data.report", source=report["source"])
    lengths = go.Figure()
    kept = [e for split in rows.values() for e in split]
    lengths.add_histogram(x=[len(e.question) for e in kept], name=say("data.questions"), opacity=0.6)
    lengths.add_histogram(x=[len(e.answer) for e in kept], name=say("data.answers"), opacity=0.6)
    lengths.update_layout(barmode="overlay", title=say("data.lengths"), template="plotly_white", height=360)
    used = {name: count for name, count in report["rules"].items() if count["rows"]}
    rules = go.Figure(go.Bar(x=[c["rows"] for c in used.values()], y=list(used), orientation="h"))
    rules.update_layout(title=say("data.rules"), template="plotly_white", height=120 + 28 * len(used))
    pictures = [
        pio.to_html(f, full_html=False, include_plotlyjs=first, config=PLOTLY, div_id=name)
        for f, first, name in ((lengths, True, "lengths"), (rules, False, "rules"))
    ]
    summary = [
        say("data.summary", **{k: report[k] for k in ("read", "kept", "repaired", "rejected")}),
        say("data.splits", **report["splits"]),
        *(
            say("data.leak", pair=pair.replace("_", " / "), **found)
            for pair, found in (report["leaks"] | report["against"]).items()
        ),
    ]
    samples = [(name, s["before"], s["after"]) for name, count in used.items() for s in count["samples"]]
    head = f"<tr><th>{say('data.rules')}</th><th>{say('data.before')}</th><th>{say('data.after')}</th></tr>"
    body = "".join("<tr>" + "".join(f"<td>{html.escape(t)}</td>" for t in s) + "</tr>" for s in samples)
    return (
        f'<!doctype html><html lang="{language()}"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style><h1>{html.escape(title)}</h1>"
        + "".join(f"<p>{html.escape(line)}</p>" for line in summary)
        + "".join(pictures)
        + f"<table>{head}{body}</table></html>\n"
    )
