"""Figures of what `msvit bench` timed: speed against MACs, and the gain by size, batch and share of coarse regions."""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .looks import legend_beside, looks

LINE_COLOUR = "#666666"
LEGIBLE = 8  # methods side by side in a plane; of more, each gets a line of its own
AXIS_TITLES = {"size": "side of the pictures (pixels)", "batch": "pictures at once", "coarse": "share coarse"}


def speeds(timings: list[dict[str, Any]]) -> Figure:
    """Draw pictures per second against MACs, a panel per model and batch, and the speed that MACs promise.

    Many methods at one place of that plane cannot be told apart: these are ranked by their gain.
    """
    table = pd.DataFrame(timings).query("kind == 'model'").dropna(subset="ms")
    panels = table.groupby(["model", "size", "batch"], sort=False)
    columns = table.groupby(["model", "size"])["batch"].nunique().max()
    rows, most = -(-len(panels) // columns), panels.size().max()
    draw, height = (_ranked_panel, 0.6 + 0.25 * most) if most > LEGIBLE else (_speed_panel, 3.4)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.2 * columns + 2, height * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (panel, shown) in zip(grid.flat, panels, strict=False):
        draw(axes, shown)
        axes.set_title("{}, {} px, batch {}".format(*panel), fontsize=9)
    legend_beside(figure)
    return figure


def _ranked_panel(axes: Axes, table: pd.DataFrame):
    """Draw the methods of one case by their gain over dense timm, with what their MACs promise."""
    shown = table[table["row"] != "dense"].sort_values("vs_dense").reset_index(drop=True)
    found = looks(shown["label"])
    for place, timing in enumerate(shown.to_dict("records")):
        gain = timing["vs_dense"]
        spread = [[gain - timing["vs_dense_low"]], [timing["vs_dense_high"] - gain]]
        axes.errorbar(gain, place, xerr=np.maximum(spread, 0), markersize=6, **found[timing["label"]].line)
    axes.scatter(shown["promised"], shown.index, marker="|", s=120, color=LINE_COLOUR, label="promised by MACs")
    axes.axvline(1, color=LINE_COLOUR, linewidth=0.8)
    axes.set_yticks(shown.index, [found[label].name for label in shown["label"]], fontsize=8)
    axes.set(xlabel="times the speed of dense timm (quartiles)", xlim=(0, None))
    axes.grid(alpha=0.3, axis="x")


def _speed_panel(axes: Axes, table: pd.DataFrame):
    """Draw the methods of one case, and through the dense ones the speed that MACs promise."""
    styles = {label: look.line | {"label": look.name} for label, look in looks(table["label"]).items()}
    x = np.linspace(table["macs"].min(), table["macs"].max(), 50)
    for timing in table.to_dict("records"):
        speed, low, high = (1e3 * timing["batch"] / timing[f"ms{end}"] for end in ("", "_high", "_low"))
        spread = [[max(speed - low, 0)], [max(high - speed, 0)]]
        axes.errorbar(timing["macs"] / 1e9, speed, spread, linestyle="", markersize=6, **styles[timing["label"]])
        if line := {"dense": "--", "dense-linear": ":"}.get(timing["row"]):
            promised, label = timing["pictures_per_s"] * timing["macs"] / x, f"promised by MACs, from {timing['label']}"
            axes.plot(x / 1e9, promised, line, color=LINE_COLOUR, zorder=0, label=label)
    axes.set(xlabel="GMACs per picture", ylabel="pictures per second", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)


def gains_by_axis(timings: list[dict[str, Any]]) -> Figure:
    """Draw the gain of packed execution by picture size, batch and share of coarse regions, and the promised one."""
    table = pd.DataFrame(timings).query("row == 'packed'").dropna(subset="ms")
    axis_names = [name for name in AXIS_TITLES if name in set(table["axis"])]
    varied = [name for name in axis_names if table.loc[table["axis"] == name, name].nunique() > 1]
    axis_names = varied or axis_names  # one value is no curve
    figure, grid = plt.subplots(
        1, len(axis_names), figsize=(4.2 * len(axis_names), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, name in zip(grid[0], axis_names, strict=True):
        varied = table[table["axis"] == name]
        for model, look in looks(table["model"]).items():
            shown = varied[varied["model"] == model]
            gain = shown["vs_dense"]
            spread = np.abs([shown["vs_dense_low"] - gain, shown["vs_dense_high"] - gain])
            axes.errorbar(shown[name], gain, yerr=spread, markersize=6, capsize=3, label=model, **look.line)
            promised = {"color": look.color, "label": f"{model}, promised by MACs"}
            axes.plot(shown[name], shown["promised"], "--", **promised)
        axes.axhline(1, color=LINE_COLOUR, linewidth=0.8)
        axes.set(xlabel=AXIS_TITLES[name])
        if name != "coarse":
            ticks = sorted(varied[name].unique())
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, ticks)
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("times the speed of dense timm")
    grid[0, 0].legend(fontsize=7, frameon=False)
    return figure
