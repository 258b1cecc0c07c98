"""Figures to hover over, by plotly: JupyterLab draws them offline, and they survive a reload.

Each has a static twin in `msvit.plots`, which is the one to keep on record.
"""

import pandas as pd
import plotly.graph_objects as go

from .style import COSTS, GREY, MARKERS, SKY, VERMILION, style

SYMBOLS = dict(
    zip(
        MARKERS,
        ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "star", "x", "pentagon", "hexagon"),
        strict=True,
    )
)
LAYOUT = {"template": "plotly_white", "height": 480, "margin": {"l": 60, "r": 20, "t": 40, "b": 60}}


def tradeoff(table: pd.DataFrame, by: str = "method", curves: pd.DataFrame | None = None, x: str = "macs") -> go.Figure:
    """Draw accuracy against cost: a point per run, mean and spread over seeds, and threshold curves as lines.

    Args:
        table: Runs with `accuracy`, the cost `x`, `run` and `seed`.
        by: Column of the methods' names.
        curves: Points of one model at several thresholds: `run`, `accuracy`, `x`, `threshold`.
        x: "macs" (a share of dense) or "pictures_per_s".
    """
    figure = go.Figure()
    factor, title = COSTS[x]
    for index, (method, runs) in enumerate(table.groupby(by, sort=False)):
        colour, symbol = style(index)["color"], SYMBOLS[style(index)["marker"]]
        cost, accuracy = runs[x] * factor, runs["accuracy"] * 100
        figure.add_scatter(
            x=cost,
            y=accuracy,
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.5},
            customdata=runs[["run", "seed"]],
            hovertemplate="%{customdata[0]}<br>seed %{customdata[1]}: %{y:.1f} % at %{x:.1f}<extra></extra>",
            legendgroup=method,
            showlegend=False,
        )
        figure.add_scatter(
            x=[cost.mean()],
            y=[accuracy.mean()],
            error_x={"array": [cost.std(ddof=1)], "visible": len(runs) > 1},
            error_y={"array": [accuracy.std(ddof=1)], "visible": len(runs) > 1},
            mode="markers",
            marker={"color": colour, "symbol": symbol, "size": 12},
            name=method,
            legendgroup=method,
            hovertemplate=f"{method}<br>mean of {len(runs)}: %{{y:.1f}} % at %{{x:.1f}}<extra></extra>",
        )
    for run, points in curves.groupby("run", sort=False) if curves is not None and len(curves) else ():
        figure.add_scatter(
            x=points[x] * factor,
            y=points["accuracy"] * 100,
            mode="lines+markers",
            line={"color": GREY, "width": 1, "dash": "dot"},
            marker={"size": 4},
            customdata=points[["threshold"]],
            name=f"other thresholds of {run}",
            hovertemplate=f"{run}<br>threshold %{{customdata[0]:.2f}}: %{{y:.1f}} % at %{{x:.1f}}<extra></extra>",
        )
    return figure.update_layout(xaxis_title=title, yaxis_title="accuracy (%)", **LAYOUT)


def front(trials: pd.DataFrame) -> go.Figure:
    """Draw accuracy against MACs of a sweep's trials; those that no other beats in both are joined by a line."""
    done = trials.dropna(subset=["accuracy"])
    best = done[done["front"]].sort_values("macs")
    figure = go.Figure()
    figure.add_scatter(
        x=done["macs"] * 100,
        y=done["accuracy"] * 100,
        mode="markers",
        marker={"color": SKY, "size": 8},
        name="trials",
        customdata=done[["trial"]],
        hovertemplate="trial %{customdata[0]}: %{y:.1f} % at %{x:.1f} %<extra></extra>",
    )
    figure.add_scatter(
        x=best["macs"] * 100,
        y=best["accuracy"] * 100,
        mode="lines+markers",
        line={"color": VERMILION},
        name="Pareto front",
        hoverinfo="skip",
    )
    return figure.update_layout(xaxis_title=COSTS["macs"][1], yaxis_title="accuracy on held-out pictures (%)", **LAYOUT)


def parallel(trials: pd.DataFrame, settings: list[str]) -> go.Figure:
    """Draw a line per finished trial through its settings, its MACs and its accuracy; the colour is the accuracy."""
    done = trials.dropna(subset=["accuracy"])
    columns = [column for column in (*settings, "macs", "accuracy") if column in done]
    dimensions = [{"label": c.removeprefix("loss_settings."), "values": done[c]} for c in columns]
    line = {"color": done["accuracy"], "colorscale": "Cividis", "showscale": True}
    return go.Figure(go.Parcoords(dimensions=dimensions, line=line)).update_layout(**LAYOUT | {"height": 420})
