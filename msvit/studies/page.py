"""The report as a page that can be sent alone: verdict, table to sort, points and curves to zoom into, maps, settings.

It holds plotly's program, 5 MB, so that it needs no network.
"""

import base64
import datetime
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from ..plots.interactive import accuracy_curves, tradeoff
from ..plots.looks import display
from ..training.names import short_name
from ..training.recipe import FIELDS
from ..training.runs import read


def write_page(
    path: Path,
    groups: Mapping[str, pd.DataFrame],
    tables: Mapping[str, pd.DataFrame],
    runs: Path,
    maps: Mapping[str, Path],
):
    """Write the page of all groups of comparable runs; nothing in it points elsewhere.

    Args:
        groups, tables: By the groups' titles.
        maps: PNG files of gate maps, for the groups that have some; they are copied into the page.
    """
    parts = [_section(title, group, tables[title], runs, maps.get(title)) for title, group in groups.items()]
    count = sum(len(group) for group in groups.values())
    today = datetime.date.today().isoformat()
    path.write_text(PAGE.format(date=today, parts="\n".join(parts), runs=count, plotly=get_plotlyjs()))


def verdict(group: pd.DataFrame) -> str:
    """Return in a sentence what the best cheaper row loses or wins beside the dense model; empty if one is missing."""
    score, of = "accuracy", "{:.1f} % of the pictures right"
    if "miou" in group and group["miou"].notna().all():
        score, of = "miou", "a mean IoU of {:.1f} %"
    means = group.groupby("label", sort=False)[[score, "macs"]].mean() * 100
    dense = means[means.index.isin(group.loc[group["method"] == "dense", "label"])]
    cheaper = means[means["macs"] < 99]
    if dense.empty or cheaper.empty:
        return ""
    best, base = cheaper[score].idxmax(), dense[score].iloc[0]
    value, macs = cheaper.loc[best]
    seeds = group.loc[group["label"] == best, "seed"].nunique()
    return (
        f"{display(best)} has {of.format(value)} at {macs:.0f} % of the MACs, the dense model {base:.1f} %: "
        f"{value - base:+.1f} points, over {seeds} seed{'s' if seeds > 1 else ''}."
    )


def _section(title: str, group: pd.DataFrame, shown: pd.DataFrame, runs: Path, maps: Path | None) -> str:
    found = {name: read(runs / name) for name in group["run"]}
    names = {name: short_name(run.recipe) for name, run in found.items()}
    named = group.assign(name=group["run"].map(names))
    code = html.escape(re.sub(r"\W+", "-", title), quote=True)
    drawings = [_drawing(tradeoff(named, "label"), f"tradeoff-{code}", f"Accuracy against MACs, {title}")]
    curves = accuracy_curves(named, {name: run.metrics for name, run in found.items()})
    if curves.data:
        drawings.append(_drawing(curves, f"curves-{code}", f"Accuracy by epoch, {title}"))
    return "\n".join(
        [
            f"<h2>{html.escape(title)}</h2>",
            f"<p class='verdict'>{html.escape(verdict(group))}</p>",
            shown.rename(index=display).rename_axis(None).to_html(border=0, classes="sortable"),
            *drawings,
            _picture(
                maps, f"Gate maps, {title}: pictures, the tokens of the best gates, and what a model sees of them"
            ),
            _settings(group),
        ]
    )


def _picture(path: Path | None, words: str) -> str:
    """Return a picture with all its bytes in the page, and words for those who do not see it."""
    if path is None:
        return ""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"<img alt='{html.escape(words, quote=True)}' src='data:image/png;base64,{data}'>"


def _drawing(figure: go.Figure, name: str, title: str) -> str:
    """Return a figure to hover over and to zoom into, with words for those who do not see it.

    Args:
        name: Another for each drawing of the page.
    """
    config = {"displaylogo": False, "responsive": True}
    drawn = figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=config)
    return f"<figure role='img' aria-label='{html.escape(title, quote=True)}'>{drawn}</figure>"


def _settings(group: pd.DataFrame) -> str:
    """Return the settings in which the rows differ as a table, and those that all share in a fold."""
    there = [name for name in FIELDS if name in group and name not in ("data", "size", "seed")]
    text = group[there].map(str)
    differ = [name for name in there if text[name].nunique() > 1]
    rows = (
        text[differ]
        .assign(label=group["label"])
        .drop_duplicates()
        .set_index("label")
        .rename_axis(None)
        .rename(index=display)
    )
    same: dict[str, Any] = {name: text[name].iloc[0] for name in there if name not in differ}
    shared = html.escape(", ".join(f"{name}={value}" for name, value in same.items()))
    table = f"<details><summary>settings that differ</summary>{rows.to_html(border=0)}</details>" if differ else ""
    return f"{table}<details><summary>settings that all of these runs share</summary><code>{shared}</code></details>"


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>msvit report</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child {{ text-align: left }}
.sortable thead th {{ cursor: pointer }}
img {{ width: 100%; max-width: 44rem; display: block }} figure {{ margin: 1rem 0 }}
.verdict {{ font-size: 17px }} details {{ overflow-x: auto }} code {{ overflow-wrap: anywhere }}
</style>
<script>{plotly}</script>
<h1>msvit report</h1>
<p>{runs} finished runs; made on {date}. Figures are means ± one standard deviation over seeds. MACs include the gate.
Click a column's head to sort; point at a mark to see its run, draw a box to look closer, click twice to go back.</p>
{parts}
<script>
for (const head of document.querySelectorAll(".sortable thead th")) head.onclick = () => {{
  const body = head.closest("table").tBodies[0], k = head.cellIndex;
  const down = (head.dataset.down = head.dataset.down !== "1" ? "1" : "0");
  const value = (row) => {{ const t = row.cells[k].textContent, n = parseFloat(t); return isNaN(n) ? t : n; }};
  const order = (a, b) => (value(a) < value(b) ? 1 : value(a) > value(b) ? -1 : 0) * (down === "1" ? 1 : -1);
  body.append(...[...body.rows].sort(order));
}};
</script>
</html>
"""
