"""Figures of what runs did: gate maps, accuracy against MACs, token counts; each function returns a figure."""

import math
import textwrap
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from .anchors import ANCHORS_TITLE
from .style import BLUE, COSTS, GREY, PICTURE_GRID, SKY, VERMILION, PictureStyle, as_the_model_sees, draw_means, style


def gate_maps(images: Tensor, decisions: Mapping[str, Tensor], drawing: PictureStyle) -> Figure:
    """Draw pictures in columns: a row for the pictures, one for each method's tokens, and what the first method sees.

    Args:
        images: Normalised, `[B, 3, H, W]`.
        decisions: Method -> coarse regions, bool `[B, h, w]`.
    """
    names = ["picture", *decisions, "as the model sees it"]
    size = (1.7 * len(images), 1.75 * len(names))
    figure, grid = plt.subplots(len(names), len(images), figsize=size, **PICTURE_GRID)
    first = next(iter(decisions.values()))
    for column, image in enumerate(images):
        drawing.draw(grid[0, column], image)
        for axes, masks in zip(grid[1:-1, column], decisions.values(), strict=True):
            coarse = masks[column]
            drawing.draw(axes, image, coarse)
            tokens = int(coarse.sum() + (~coarse).sum() * drawing.scale**2)
            axes.set_xlabel(f"{tokens} patch tokens", fontsize=8)
        drawing.draw(grid[-1, column], as_the_model_sees(image, first[column], drawing.scale))
    for axes, name in zip(grid[:, 0], names, strict=True):
        axes.set_ylabel(textwrap.fill(name, 18), fontsize=9)
    return figure


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
        fine = (~coarse).double().mean(0)
        shown = axes.imshow(fine.numpy() * 100, vmin=0, vmax=100, cmap="cividis")
        axes.set(title=name, xlabel=f"{100 * fine.mean():.0f} % fine")
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
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    if anchors is not None:
        title = f"{ANCHORS_TITLE}:\npoints more or less than dense"
        marks = _draw_anchors(axes, anchors, factor)
        figure.legend(
            handles=marks, title=title, loc="outside right lower", fontsize=8, title_fontsize=8, frameon=False
        )
    return figure


def _draw_anchors(axes: Axes, anchors: pd.DataFrame, factor: float) -> list[Line2D]:
    """Draw published results as hollow grey marks below all others, and return these."""
    marks = []
    for index, anchor in enumerate(anchors.itertuples()):
        look = {"marker": style(index)["marker"], "color": GREY, "markerfacecolor": "none", "linestyle": ""}
        point = anchor.macs * factor, anchor.accuracy * 100
        marks += axes.plot(*point, **look, markersize=7, zorder=1, label=anchor.label)
    return marks


def token_counts(counts: Mapping[str, Tensor], lowest: int, highest: int) -> Figure:
    """Draw how many tokens each picture gets, a row per method: from all coarse (`lowest`) to all fine (`highest`)."""
    size = (6.4, 0.9 + 0.75 * len(counts))
    figure, grid = plt.subplots(len(counts), 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    bins = np.linspace(lowest, highest, 33)
    for index, (name, values) in enumerate(counts.items()):
        axes, values = grid[index, 0], values.double().cpu().numpy()
        axes.hist(values, bins=bins, color=style(index)["color"])
        axes.axvline(values.mean(), color="black", linestyle="--", linewidth=1)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
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


def importance(shares: Mapping[str, float]) -> Figure:
    """Draw how much of the score's variance each setting explains."""
    figure, axes = plt.subplots(figsize=(6.4, 0.8 + 0.35 * len(shares)), layout="constrained")
    names = sorted(shares, key=shares.__getitem__)
    axes.barh([n.removeprefix("loss_settings.") for n in names], [100 * shares[n] for n in names], color=BLUE)
    axes.set_xlabel("share of the score's variance (%), by fANOVA")
    return figure
