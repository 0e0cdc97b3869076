"""A plan on the terminal, and as one page that needs no network."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from ..data.report import PLOTLY, STYLE
from ..messages import language, say
from .plan import explain

_WIDTH = 30  # of the longest bar, in characters


def print_plan(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    table = Table(title=_title(result), title_justify="left", box=None, pad_edge=False)
    table.add_column(say("plan.row"))
    table.add_column("GiB", justify="right")
    table.add_column("")
    total = result["predicted_peak_bytes"]
    for row in result["ledger"]:
        table.add_row(row["name"], _gib(row["bytes"]), "█" * round(_WIDTH * row["bytes"] / total))
    table.add_row(say("plan.sum"), _gib(total), "")
    console.print(table)
    for line in lines(result):
        console.print(line, markup=False)


def lines(result: dict[str, Any]) -> list[str]:
    """What is said under the table, in the process's language."""
    memory = result["memory"]
    fit = say(
        "plan.fits" if result["fits"] else "plan.fits_not",
        peak=_gib(result["predicted_peak_bytes"]),
        memory=_gib(memory["bytes"]),
        device=memory["device"],
    )
    said = [fit]
    if "why" in result:
        return [*said, explain(result)]
    asked, recipe = result["asked"], result["recipe"]
    if changed := {k: v for k, v in recipe.items() if k in asked and asked[k] != v}:
        said.append(say("plan.changed", asked=_gib(asked["predicted_peak_bytes"]), changes=_flags(changed)))
    for s in result["switches"]:
        key = "plan.switch_changes" if s["changes_gradient"] else "plan.switch"
        said.append(
            say(
                key,
                flag=s["flag"],
                frees=f"{s['frees_bytes'] / 2**30:+.2f}",
                time=f"{100 * s['time']:+.0f}",
                fits=say("plan.yes") if s["fits"] else say("plan.no"),
            )
        )
    if not result["keeps_by_hand"]:
        said.append(say("plan.by_hand", names="  ".join(f"--{n.replace('_', '-')}" for n in result["by_hand"])))
    off = result["offload"]
    if off["frees_bytes"]:
        frees = f"{off['frees_bytes'] / 2**30:+.2f}"
        said.append(
            say("plan.offload_alone", frees=frees)
            if off["instead"] is None
            else say("plan.offload", frees=frees, instead=_flags(off["instead"]), time=f"{100 * off['time']:+.0f}")
        )
    for phase in result["phases"]:
        where = say("plan.host") if phase["on_host"] else say("plan.device")
        said.append(say("plan.phase", name=phase["name"], gib=_gib(phase["bytes"]), where=where))
    if (epoch := result["epoch"]) is not None:
        said.append(
            say("plan.epoch", rows=f"{epoch['rows']:,}", tokens=f"{epoch['tokens']:,}", flops=f"{epoch['flops']:.2e}")
        )
        if epoch["seconds"] is not None:
            said.append(
                say(
                    "plan.epoch_time",
                    minutes=f"{epoch['seconds'] / 60:.0f}",
                    mfu=f"{epoch['assumed_mfu']:.0%}",
                    device=memory["device"],
                )
            )
    return said


def _flags(settings: dict[str, Any]) -> str:
    return "  ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def write_page(result: dict[str, Any], file: Path) -> None:
    """Bars of every moment, one colour a row, and the memory as a line."""
    import plotly.graph_objects as go
    import plotly.io as pio

    moments = [p for p in result["phases"] if not p["on_host"]]
    names = list(dict.fromkeys(row["name"] for p in moments for row in p["ledger"]))
    figure = go.Figure()
    for name in names:
        sizes = [sum(r["bytes"] for r in p["ledger"] if r["name"] == name) / 2**30 for p in moments]
        figure.add_bar(y=[p["name"] for p in moments], x=sizes, name=name, orientation="h")
    figure.add_vline(x=result["memory"]["bytes"] / 2**30, line_dash="dash")
    figure.update_layout(
        barmode="stack",
        template="plotly_white",
        xaxis_title="GiB",
        yaxis_autorange="reversed",
        height=200 + 60 * len(moments),
        legend={"orientation": "h", "y": -0.2},
    )
    picture = pio.to_html(figure, full_html=False, include_plotlyjs=True, config=PLOTLY, div_id="ledger")
    rows = "".join(
        f'<tr><td>{html.escape(r["name"])}</td><td class="n">{_gib(r["bytes"])}</td></tr>' for r in result["ledger"]
    )
    title = html.escape(_title(result))
    file.write_text(
        f'<!doctype html><html lang="{language()}"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
        f"<h1>{title}</h1>{picture}<table><tr><th>{say('plan.row')}</th><th>GiB</th></tr>{rows}"
        f'<tr><th>{say("plan.sum")}</th><td class="n">{_gib(result["predicted_peak_bytes"])}</td></tr></table>'
        + "".join(f"<p>{html.escape(line)}</p>" for line in lines(result))
        + "</html>\n",
        encoding="utf-8",
    )


def _title(result: dict[str, Any]) -> str:
    return say("plan.title", model=result["model"]["name"], recipe=result["recipe"]["name"], phase=result["peak_phase"])


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"
