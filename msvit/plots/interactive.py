"""Figures to hover over, by plotly: JupyterLab draws them offline, and they survive a reload.

Each has a static twin in `msvit.plots`, which is the one to keep on record, and which `Beside` shows where no program
draws the other: in pages that nbconvert makes, on code hosts, on paper.
"""

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .anchors import ANCHORS_TITLE
from .looks import looks
from .style import COSTS, GREY, SKY, VERMILION

SYMBOLS = {  # of matplotlib's markers
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "d": "diamond-tall",
    "^": "triangle-up",
    "v": "triangle-down",
    "<": "triangle-left",
    ">": "triangle-right",
    "P": "cross",
    "X": "x",
    "*": "star",
    "p": "pentagon",
    "h": "hexagon",
    "H": "hexagon2",
    "8": "octagon",
}
LAYOUT = {"template": "plotly_white", "height": 480, "margin": {"l": 60, "r": 20, "t": 40, "b": 60}}


class Beside:
    """A figure to hover over for JupyterLab, and its static twin in the same output for all that cannot draw it."""

    def __init__(self, figure: go.Figure, twin: Figure):
        self.figure, buffer = figure, io.BytesIO()
        twin.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
        plt.close(twin)  # or the notebook draws it once more
        self.png = base64.b64encode(buffer.getvalue()).decode()

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        plotly = json.loads(self.figure.to_json())
        return {"application/vnd.plotly.v1+json": plotly, "image/png": self.png, "text/plain": "a figure"}


def tradeoff(
    table: pd.DataFrame,
    by: str = "method",
    curves: pd.DataFrame | None = None,
    x: str = "macs",
    anchors: pd.DataFrame | None = None,
) -> go.Figure:
    """Draw accuracy against cost: a point per run, mean and spread over seeds, and threshold curves as lines.

    Args:
        table: Runs with `accuracy`, the cost `x`, `run` and `seed`.
        by: Column of the methods' names.
        curves: Points of one model at several thresholds: `run`, `accuracy`, `x`, `threshold`.
        x: "macs" (a share of dense) or "pictures_per_s".
        anchors: Published results, as hollow marks, from `plots.anchors_beside`; of MACs only.
    """
    factor, title = COSTS[x]
    figure = go.Figure()

    def add(across: Any, up: Any, text: str, **options: Any):
        text += ": %{y:.1f} % at %{x:.1f}<extra></extra>"
        figure.add_scatter(x=across, y=up, hovertemplate=text, **options)

    for method, look in looks(table[by]).items():
        runs = table[table[by] == method]
        marker = {"color": look.color, "symbol": SYMBOLS[look.marker]}
        group = {"mode": "markers", "legendgroup": method}
        cost, accuracy = runs[x] * factor, runs["accuracy"] * 100
        hover = runs[["name" if "name" in runs else "run", "seed"]]
        small = {"marker": marker | {"size": 7, "opacity": 0.5}, "showlegend": False}
        text = "%{customdata[0]}<br>seed %{customdata[1]}"
        add(cost, accuracy, text, customdata=hover, **small, **group)
        x_bar, y_bar = ({"array": [values.std(ddof=1)], "visible": len(runs) > 1} for values in (cost, accuracy))
        large = {"marker": marker | {"size": 12}, "name": look.name, "error_x": x_bar, "error_y": y_bar}
        add([cost.mean()], [accuracy.mean()], f"{look.name}<br>mean of {len(runs)}", **large, **group)
    line = {"mode": "lines+markers", "line": {"color": GREY, "width": 1, "dash": "dot"}, "marker": {"size": 4}}
    for run, points in curves.groupby("run", sort=False) if curves is not None else ():
        text, extra = f"{run}<br>threshold %{{customdata[0]:.2f}}", {"customdata": points[["threshold"]]}
        add(points[x] * factor, points["accuracy"] * 100, text, name=f"other thresholds of {run}", **extra, **line)
    marks = looks(anchors["label"]).values() if anchors is not None else ()
    for anchor, look in zip(anchors.itertuples() if anchors is not None else (), marks, strict=True):
        marker = {"color": GREY, "symbol": f"{SYMBOLS[look.marker]}-open", "size": 9}
        group = {"mode": "markers", "legendgroup": ANCHORS_TITLE, "legendgrouptitle": {"text": ANCHORS_TITLE}}
        point = [anchor.macs * factor], [anchor.accuracy * 100]
        add(*point, f"{anchor.label}<br>{ANCHORS_TITLE}", marker=marker, name=anchor.label, **group)
    return figure.update_layout(xaxis_title=title, yaxis_title="accuracy (%)", **LAYOUT)


def accuracy_curves(table: pd.DataFrame, metrics: Mapping[str, Sequence[Mapping[str, Any]]]) -> go.Figure:
    """Draw validation accuracy by epoch, a line per run in the colour of its method.

    Args:
        table: Runs with `run`, `label` and `name`.
        metrics: By run, the lines of its `metrics.jsonl`.
    """
    figure = go.Figure()
    for label, look in looks(table["label"]).items():
        first = True
        for run, name in table.loc[table["label"] == label, ["run", "name"]].itertuples(index=False):
            whole = [line for line in metrics[run] if "val_accuracy" in line]
            if not whole:
                continue
            group = {"name": look.name, "legendgroup": label, "showlegend": first}
            figure.add_scatter(
                x=[line["epoch"] for line in whole],
                y=[100 * line["val_accuracy"] for line in whole],
                hovertemplate=f"{name}, epoch %{{x}}: %{{y:.1f}} %<extra></extra>",
                mode="lines+markers",
                marker={"color": look.color, "symbol": SYMBOLS[look.marker]},
                **group,
            )
            first = False
    longest = max((len(trace.x) for trace in figure.data), default=1)
    axis = {"title": "epoch", "dtick": math.ceil(longest / 12)}  # whole epochs
    return figure.update_layout(xaxis=axis, yaxis_title="validation accuracy (%)", **LAYOUT)


def front(trials: pd.DataFrame) -> go.Figure:
    """Draw accuracy against MACs of a sweep's trials; those that no other beats in both are joined by a line."""
    done = trials.dropna(subset=["accuracy"])
    best = done[done["front"]].sort_values("macs")
    figure = go.Figure()
    text = "trial %{customdata[0]}: %{y:.1f} % at %{x:.1f} %<extra></extra>"
    points = {"mode": "markers", "marker": {"color": SKY, "size": 8}, "name": "trials", "customdata": done[["trial"]]}
    figure.add_scatter(x=done["macs"] * 100, y=done["accuracy"] * 100, hovertemplate=text, **points)
    line = {"mode": "lines+markers", "line": {"color": VERMILION}, "name": "Pareto front", "hoverinfo": "skip"}
    figure.add_scatter(x=best["macs"] * 100, y=best["accuracy"] * 100, **line)
    return figure.update_layout(xaxis_title=COSTS["macs"][1], yaxis_title="accuracy on held-out pictures (%)", **LAYOUT)


def parallel(trials: pd.DataFrame, settings: list[str]) -> go.Figure:
    """Draw a line per finished trial through its settings, its MACs and its accuracy; the colour is the accuracy."""
    done = trials.dropna(subset=["accuracy"])
    columns = [column for column in (*settings, "macs", "accuracy") if column in done]
    dimensions = [{"label": c.removeprefix("loss_settings."), "values": done[c]} for c in columns]
    line = {"color": done["accuracy"], "colorscale": "Cividis", "showscale": True}
    return go.Figure(go.Parcoords(dimensions=dimensions, line=line)).update_layout(**LAYOUT | {"height": 420})
