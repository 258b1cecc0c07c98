"""Figures of what `msvit bench` timed: speed against MACs, and the gain by size, batch and share of coarse regions."""

from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import style

LINE_COLOUR = "#666666"
AXIS_TITLES = {"size": "side of the pictures (pixels)", "batch": "pictures at once", "coarse": "share coarse"}


def speeds_against_macs(timings: list[dict[str, Any]]) -> Figure:
    """Draw pictures per second against MACs, a panel per model and batch, and the speed that MACs promise."""
    timings = [timing for timing in timings if timing["kind"] == "model" and "ms" in timing]
    labels = list(dict.fromkeys(timing["label"] for timing in timings))
    panels = list(dict.fromkeys((timing["model"], timing["size"], timing["batch"]) for timing in timings))
    columns = max(sum(panel[:2] == other[:2] for other in panels) for panel in panels)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.2 * columns + 2, 3.4 * rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid.flat, panels, strict=False):
        shown = [timing for timing in timings if (timing["model"], timing["size"], timing["batch"]) == panel]
        _speed_panel(axes, shown, labels)
        axes.set_title("{}, {} px, batch {}".format(*panel), fontsize=9)
    handles = {text: line for axes in figure.axes for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _speed_panel(axes: Axes, timings: list[dict[str, Any]], labels: list[str]):
    """Draw the methods of one case, and through the dense ones the speed that MACs promise."""
    for timing in timings:
        speed, low, high = (1e3 * timing["batch"] / timing[f"ms{end}"] for end in ("", "_high", "_low"))
        spread = [[max(speed - low, 0)], [max(high - speed, 0)]]
        drawn = style(labels.index(timing["label"])) | {"label": timing["label"]}
        axes.errorbar(timing["macs"] / 1e9, speed, yerr=spread, linestyle="", markersize=6, **drawn)
    x = np.linspace(min(timing["macs"] for timing in timings), max(timing["macs"] for timing in timings), 50)
    for timing in timings:
        if line := {"dense": "--", "dense-linear": ":"}.get(timing["row"]):
            promised, label = timing["pictures_per_s"] * timing["macs"] / x, f"promised by MACs, from {timing['label']}"
            axes.plot(x / 1e9, promised, line, color=LINE_COLOUR, zorder=0, label=label)
    axes.set(xlabel="GMACs per picture", ylabel="pictures per second", xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)


def gains_by_axis(timings: list[dict[str, Any]]) -> Figure:
    """Draw the gain of packed execution by picture size, batch and share of coarse regions, and the promised one."""
    timings = [timing for timing in timings if timing["row"] == "packed" and "ms" in timing]
    axis_names = [name for name in AXIS_TITLES if any(timing["axis"] == name for timing in timings)]
    models = list(dict.fromkeys(timing["model"] for timing in timings))
    figure, grid = plt.subplots(
        1, len(axis_names), figsize=(4.2 * len(axis_names), 3.6), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, name in zip(grid[0], axis_names, strict=True):
        for index, model in enumerate(models):
            shown = [timing for timing in timings if (timing["axis"], timing["model"]) == (name, model)]
            x = [timing[name] for timing in shown]
            gain, low, high = (
                np.array([timing[f"vs_dense{end}"] for timing in shown]) for end in ("", "_low", "_high")
            )
            spread = np.abs([low - gain, high - gain])
            axes.errorbar(x, gain, yerr=spread, markersize=6, capsize=3, label=model, **style(index))
            promised = [timing["promised"] for timing in shown]
            axes.plot(x, promised, "--", color=style(index)["color"], label=f"{model}, promised by MACs")
        axes.axhline(1, color=LINE_COLOUR, linewidth=0.8)
        axes.set(xlabel=AXIS_TITLES[name])
        if name != "coarse":
            ticks = sorted({timing[name] for timing in timings if timing["axis"] == name})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, ticks)
        axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("times the speed of dense timm")
    grid[0, 0].legend(fontsize=7, frameon=False)
    return figure
