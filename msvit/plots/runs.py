"""Figures of what runs did: gate maps, accuracy against MACs, token counts; each function returns a figure."""

import math
import textwrap
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from torch import Tensor

from .anchors import ANCHORS_TITLE
from .looks import display, draw_means, legend_beside, looks
from .style import BLUE, COSTS, GREY, ORANGE, PICTURE_GRID, SKY, VERMILION, PictureStyle, as_the_model_sees


def gate_maps(
    images: Tensor, decisions: Mapping[str, Tensor], drawing: PictureStyle, words: Mapping[str, list[str]] | None = None
) -> Figure:
    """Draw pictures in columns: a row for the pictures, one for each method's tokens, and what the first method sees.

    Args:
        images: Normalised, `[B, 3, H, W]`.
        decisions: Method -> coarse regions, bool `[B, h, w]`.
        words: Method -> what to say under each of its pictures; under "" of the pictures themselves.
    """
    words, first = words or {}, next(iter(decisions))
    names = ["picture", *map(display, decisions), f"pixels in the tokens of {display(first)}"]
    size = (1.7 * len(images), 1.9 * len(names) + 0.3)
    figure, grid = plt.subplots(len(names), len(images), figsize=size, **PICTURE_GRID)
    for column, image in enumerate(images):
        drawing.draw(grid[0, column], image)
        if "" in words:
            grid[0, column].set_xlabel(words[""][column], fontsize=8)
        for axes, (name, masks) in zip(grid[1:-1, column], decisions.items(), strict=True):
            coarse = masks[column]
            drawing.draw(axes, image, coarse)
            each = torch.where(coarse > 0, 0.25 ** (coarse.long() - 1), drawing.scale**2)  # region, in tokens
            tokens = int(each.sum())
            said = f"\n{words[name][column]}" if name in words else ""
            axes.set_xlabel(f"{tokens} patch tokens{said}", fontsize=8)
        drawing.draw(grid[-1, column], as_the_model_sees(image, decisions[first][column], drawing.scale))
    for axes, name in zip(grid[:, 0], names, strict=True):
        axes.set_ylabel(textwrap.fill(name, 18), fontsize=9)
    frames = [Patch(fill=False, edgecolor=ORANGE, linewidth=1.5, label="one coarse token")]
    frames += [Patch(fill=False, edgecolor=SKY, linewidth=1.5, label="a fine token each")]
    figure.legend(handles=frames, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def ranking(table: pd.DataFrame, by: str = "method") -> Figure:
    """Draw the accuracy of each method in a line of its own, the best on top: seeds, their mean, and what it costs."""
    means = table.groupby(by, sort=False)[["accuracy", "macs"]].mean().sort_values("accuracy")
    figure, axes = plt.subplots(figsize=(6.4, 0.9 + 0.3 * len(means)), layout="constrained")
    look_of = looks(table[by])
    for row, method in enumerate(means.index):
        look = look_of[method]
        values = table.loc[table[by] == method, "accuracy"] * 100
        axes.plot(values, [row] * len(values), look.marker, color=look.color, markersize=4, alpha=0.4)
        spread = values.std() if len(values) > 1 else None
        axes.errorbar(values.mean(), row, xerr=spread, **look.line, markersize=7, capsize=3)
        axes.text(
            1.01, row, f"{means.loc[method, 'macs']:.0%}", transform=axes.get_yaxis_transform(), va="center", fontsize=8
        )
    axes.set_yticks(range(len(means)), [textwrap.fill(display(name), 40) for name in means.index], fontsize=8)
    axes.text(1.01, len(means) - 0.3, "MACs", transform=axes.get_yaxis_transform(), fontsize=8)
    axes.set(xlabel="accuracy (%)", ylim=(-0.6, len(means) - 0.4))
    if (end := near_end(means["accuracy"] * 100)) is not None:
        axes.set_xlim(end, min(axes.get_xlim()[1], 101))
        for row, value in enumerate(means["accuracy"] * 100):
            if value < end:
                axes.annotate(
                    f"◂ {value:.1f} %", (0.01, row), xycoords=axes.get_yaxis_transform(), va="center", fontsize=8
                )
    axes.grid(axis="x", alpha=0.3)
    return figure


def near_end(values: pd.Series) -> float | None:
    """Return where an axis begins that leaves out a few values far below all others; None if there are none such.

    Far is more than half of the whole span, few are a third of the values at most.
    """
    ordered = np.sort(values.dropna().to_numpy())
    gaps = np.diff(ordered)
    below = int(gaps.argmax()) + 1 if len(gaps) else 0
    if not below or 3 * below > len(ordered) or gaps.max() <= 0.5 * (ordered[-1] - ordered[0]):
        return None
    return float(ordered[below] - max(0.15 * (ordered[-1] - ordered[below]), 1.0))


def picture_pairs(images: Tensor, coarse: Tensor, captions: list[tuple[str, str]], drawing: PictureStyle) -> Figure:
    """Draw each picture above what a model sees of it, with its tokens, six pairs in a band; a caption to each of both.

    Args:
        images: Normalised, `[B, 3, H, W]`; there may be none.
        coarse: Decisions, bool `[B, h, w]`.
    """
    columns, bands = 6, math.ceil(len(images) / 6)
    size = (1.5 * columns, max(3.6 * bands, 0.4))
    figure, grid = plt.subplots(2 * max(bands, 1), columns, figsize=size, **PICTURE_GRID)
    for axes in grid.flat:
        axes.set_visible(False)
    for number, (image, decisions, texts) in enumerate(zip(images, coarse, captions, strict=True)):
        pair = grid[2 * (number // columns) :, number % columns][:2]
        drawing.draw(pair[0], image)
        drawing.draw(pair[1], as_the_model_sees(image, decisions, drawing.scale), decisions)
        for axes, text in zip(pair, texts, strict=True):
            axes.set_visible(True)
            axes.set_xlabel(text, fontsize=8)
    return figure


def positions(decisions: Mapping[str, Tensor]) -> Figure:
    """Draw how often each region of a picture is fine, a panel per method: where the tokens go on average.

    Args:
        decisions: Method -> coarse regions, bool `[B, h, w]`.
    """
    size = (2.6 * len(decisions) + 0.8, 2.9)
    figure, grid = plt.subplots(1, len(decisions), figsize=size, **PICTURE_GRID)
    for axes, (name, coarse) in zip(grid[0], decisions.items(), strict=True):
        fine = (coarse == 0).double().mean(0)
        shown = axes.imshow(fine.numpy() * 100, vmin=0, vmax=100, cmap="cividis")
        axes.set_xlabel(f"{100 * fine.mean():.0f} % fine")
        axes.set_title(textwrap.fill(display(name), 24), fontsize=9)
    figure.colorbar(shown, ax=grid, label="pictures in which the region is fine (%)", shrink=0.9)
    return figure


def tradeoff(
    table: pd.DataFrame,
    by: str = "method",
    curves: pd.DataFrame | None = None,
    x: str = "macs",
    anchors: pd.DataFrame | None = None,
) -> Figure:
    """Draw accuracy against a cost of COSTS, a point per method: mean over seeds, bars of one standard deviation.

    Args:
        curves: Points of single models at several thresholds, as dotted lines: `run`, `accuracy`, `macs`.
        anchors: Published results, as hollow grey marks, from `plots.anchors_beside`; of MACs only.
    """
    factor, title = COSTS[x]
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    draw_means(axes, table[x] * factor, table["accuracy"] * 100, table[by], markersize=8)
    for _, points in curves.groupby("run", sort=False) if curves is not None else ():
        axes.plot(points[x] * factor, points["accuracy"] * 100, ":", color=GREY, zorder=0)
    axes.set(xlabel=title, ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    if anchors is None and curves is None:
        costs = pd.DataFrame({"cost": table[x] * factor, "accuracy": table["accuracy"] * 100})
        _leave_out_below(axes, costs.groupby(table[by], sort=False).mean())
    axes.set_ylim(top=min(axes.get_ylim()[1], 101))
    legend_beside(figure)
    if anchors is not None:
        title = f"{ANCHORS_TITLE}:\npoints more or less than dense"
        marks = _draw_anchors(axes, anchors, factor)
        figure.legend(
            handles=marks, title=title, loc="outside right lower", fontsize=8, title_fontsize=8, frameon=False
        )
    return figure


def _leave_out_below(axes: Axes, means: pd.DataFrame):
    """Begin the axis above methods that are far below all others, which are marked at its end."""
    if (end := near_end(means["accuracy"])) is None:
        return
    axes.set_ylim(bottom=end)
    edge = axes.get_xaxis_transform()
    for look, (across, accuracy) in zip(looks(means.index).values(), means.to_numpy(), strict=True):
        if accuracy < end:
            axes.plot(across, 0.04, **look.line, markersize=8, transform=edge)
            axes.annotate(f"↓ {accuracy:.1f} %", (across, 0.04), (8, -3), edge, textcoords="offset points", fontsize=8)


def _draw_anchors(axes: Axes, anchors: pd.DataFrame, factor: float) -> list[Line2D]:
    """Draw published results as hollow grey marks below all others, and return these."""
    marks = []
    for anchor, look in zip(anchors.itertuples(), looks(anchors["label"]).values(), strict=True):
        style = {"marker": look.marker, "color": GREY, "markerfacecolor": "none", "linestyle": ""}
        point = anchor.macs * factor, anchor.accuracy * 100
        marks += axes.plot(*point, **style, markersize=7, zorder=1, label=anchor.label)
    return marks


def token_counts(counts: Mapping[str, Tensor], lowest: int, highest: int, step: int = 1) -> Figure:
    """Draw how many tokens each picture gets, a row per method: from all coarse (`lowest`) to all fine (`highest`).

    Args:
        step: Tokens that one region more or less makes; bars stand on the counts that there can be.
    """
    size = (6.4, 0.9 + 0.75 * len(counts))
    figure, grid = plt.subplots(len(counts), 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    width = step * max(1, math.ceil((highest - lowest) / (48 * step)))
    bins = np.arange(lowest - width / 2, highest + width, width)
    for axes, (name, look) in zip(grid[:, 0], looks(counts).items(), strict=True):
        values = counts[name].double().cpu().numpy()
        axes.hist(values, bins=bins, color=look.color)
        axes.axvline(values.mean(), color="black", linestyle="--", linewidth=1)
        axes.set_ylabel(textwrap.fill(look.name, 24), rotation=0, ha="right", va="center", fontsize=8)
        axes.set_yticks([])
        mean = f"{values.mean():.1f} ± {values.std():.1f}"
        axes.text(0.99, 0.8, mean, transform=axes.transAxes, ha="right", fontsize=8)
    grid[-1, 0].set_xlabel(f"tokens of a picture ({lowest} = all coarse, {highest} = all fine; dashed: the mean)")
    return figure


def front(trials: pd.DataFrame) -> Figure:
    """Draw a sweep's finished trials, and the line of those that no other beats in accuracy and MACs."""
    done = trials.dropna(subset=["accuracy"])
    best = done[done["front"]].sort_values("macs")
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.plot(done["macs"] * 100, done["accuracy"] * 100, "o", color=SKY, label="trials")
    axes.plot(best["macs"] * 100, best["accuracy"] * 100, "-D", color=VERMILION, label="Pareto front")
    axes.set(xlabel=COSTS["macs"][1], ylabel="accuracy on held-out pictures (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def parallel(trials: pd.DataFrame, settings: list[str]) -> Figure:
    """Draw a line per finished trial through its settings, its MACs and its accuracy; bright is accurate."""
    done = trials.dropna(subset=["accuracy"]).sort_values("accuracy")
    columns = [column for column in (*settings, "macs", "accuracy") if column in done]
    low, high = done[columns].min(), done[columns].max()
    heights = (done[columns] - low) / (high - low).replace(0, 1)
    figure, axes = plt.subplots(figsize=(1.3 * len(columns) + 1, 3.8), layout="constrained")
    for accuracy, line in zip(heights["accuracy"], heights.to_numpy(), strict=True):
        axes.plot(range(len(columns)), line, color=colormaps["cividis"](accuracy), linewidth=1.2)
    axes.set_xticks(range(len(columns)), [c.removeprefix("loss_settings.") for c in columns], fontsize=8)
    for place, column in enumerate(columns):
        axes.axvline(place, color=GREY, linewidth=0.6)
        for height, end in ((-0.07, low), (1.03, high)):
            axes.text(place, height, f"{end[column]:.3g}", ha="center", fontsize=7)
    axes.set(ylim=(-0.1, 1.1), yticks=[])
    axes.tick_params(axis="x", pad=8)
    return figure


def importance(shares: Mapping[str, float]) -> Figure:
    """Draw how much of the score's variance each setting explains."""
    figure, axes = plt.subplots(figsize=(6.4, 0.8 + 0.35 * len(shares)), layout="constrained")
    names = sorted(shares, key=shares.__getitem__)
    axes.barh([n.removeprefix("loss_settings.") for n in names], [100 * shares[n] for n in names], color=BLUE)
    axes.set_xlabel("share of the score's variance (%), by fANOVA")
    return figure
