"""The report as a page that can be sent alone: verdict, table to sort, points to hover over, curves, maps, settings."""

import base64
import datetime
import html
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from matplotlib.ticker import MaxNLocator

from ..plots.looks import Look, display, looks
from ..training.names import short_name
from ..training.recipe import FIELDS
from ..training.runs import read

WIDTH, HEIGHT, LEFT, BELOW = 640, 360, 56, 44  # of a drawing, and the room for its axes


class Mark(NamedTuple):
    """Something to draw: points of one look, joined by a line if `joined`; `text` is what hovering shows of each."""

    look: Look
    points: list[tuple[float, float]]
    text: list[str]
    joined: bool = False


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
    path.write_text(PAGE.format(date=datetime.date.today().isoformat(), parts="\n".join(parts), runs=count))


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
    points, curves = [], []
    for label, look in looks(group["label"]).items():
        rows = group[group["label"] == label]
        at = list(zip(100 * rows["macs"], 100 * rows["accuracy"], strict=True))
        said = [f"{names[r]}: {y:.1f} % at {x:.1f} %" for r, (x, y) in zip(rows["run"], at, strict=True)]
        points.append(Mark(look, at, said))
        for name in rows["run"]:
            whole = [line for line in found[name].metrics if "val_accuracy" in line]
            lines = [(line["epoch"], 100 * line["val_accuracy"]) for line in whole]
            curves.append(Mark(look, lines, [f"{names[name]}, epoch {x}: {y:.1f} %" for x, y in lines], joined=True))
    drawings = [_drawing(points, "MACs (% of dense)", "accuracy (%)", f"Accuracy against MACs, {title}")]
    if any(mark.points for mark in curves):
        drawings.append(_drawing(curves, "epoch", "accuracy (%)", f"Accuracy by epoch, {title}"))
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


def _drawing(marks: Iterable[Mark], across: str, up: str, title: str) -> str:
    """Return points and lines as SVG inside of the page, with axes, a legend, and words for those who do not see it."""
    marks = [mark for mark in marks if mark.points]
    (x0, x1), (y0, y1) = (_span([point[k] for mark in marks for point in mark.points]) for k in (0, 1))

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = (x - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return LEFT + across * (WIDTH - LEFT - 12), HEIGHT - BELOW - up * (HEIGHT - BELOW - 12)

    parts = [f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' aria-label='{html.escape(title, quote=True)}'>"]
    for x in _ticks(x0, x1):
        px, _ = at(x, y0)
        parts.append(f"<path d='M{px:.1f} 12V{HEIGHT - BELOW}' stroke='#ddd'/>")
        parts.append(f"<text x='{px:.1f}' y='{HEIGHT - BELOW + 16}' text-anchor='middle'>{x:g}</text>")
    for y in _ticks(y0, y1):
        _, py = at(x0, y)
        parts.append(f"<path d='M{LEFT} {py:.1f}H{WIDTH - 12}' stroke='#ddd'/>")
        parts.append(f"<text x='{LEFT - 6}' y='{py + 4:.1f}' text-anchor='end'>{y:g}</text>")
    parts.append(f"<text x='{WIDTH / 2}' y='{HEIGHT - 8}' text-anchor='middle'>{across}</text>")
    parts.append(f"<text transform='translate(12 {HEIGHT / 2}) rotate(-90)' text-anchor='middle'>{up}</text>")
    for mark in marks:
        places = [at(*point) for point in mark.points]
        if mark.joined:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f"<polyline points='{line}' fill='none' stroke='{mark.look.color}' stroke-width='1.5'/>")
        for (x, y), text in zip(places, mark.text, strict=True):
            said = f"<title>{html.escape(text)}</title>"
            size = 3 if mark.joined else 6
            parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{size}' fill='{mark.look.color}'>{said}</circle>")
    colours = {mark.look.name: mark.look.color for mark in marks}
    key = "".join(f"<span><i style='background:{c}'></i>{html.escape(name)}</span>" for name, c in colours.items())
    return "\n".join([*parts, "</svg>", f"<p class='key'>{key}</p>"])


def _span(values: list[float]) -> tuple[float, float]:
    """Return the ends of an axis: those of the values, and some room."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 1.0
    return low - room, high + room


def _ticks(low: float, high: float) -> list[float]:
    """Return round numbers between the ends of an axis, whole ones where the axis is long enough."""
    at = MaxNLocator(6, integer=high - low > 1, steps=[1, 2, 5, 10]).tick_values(low, high)
    return [round(float(x), 9) for x in at if low <= x <= high]


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
svg, img {{ width: 100%; max-width: 44rem; font-size: 12px; display: block }}
.key span {{ margin-right: 1rem; white-space: nowrap }} .key i {{ display: inline-block; width: .8em; height: .8em;
border-radius: 50%; margin-right: .3em }}
.verdict {{ font-size: 17px }} details {{ overflow-x: auto }} code {{ overflow-wrap: anywhere }}
</style>
<h1>msvit report</h1>
<p>{runs} finished runs; made on {date}. Figures are means ± one standard deviation over seeds. MACs include the gate.
Click a column's head to sort; point at a mark to see its run.</p>
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
