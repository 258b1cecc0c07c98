"""Figures of what a gate learns: what there is to win, how it ranks regions, how sure it is, what pulls at it."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from .looks import looks
from .style import BLUE, GREY, PICTURE_GRID, VERMILION, PictureStyle

SEARCHED = ("best of", "greedy")  # what knows the labels


def winnings(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the loss with the same number of coarse regions by who chooses them, a panel for each model.

    Args:
        tables: Model -> what `gate_learning.winnings` returns. The band is the spread of random masks from one draw to
            the next.
    """
    size = (5.2 * len(tables), 0.45 * max(map(len, tables.values())) + 1.4)
    figure, panels = plt.subplots(1, len(tables), figsize=size, layout="constrained", squeeze=False)
    for axes, (name, table) in zip(panels[0], tables.items(), strict=True):
        chance, spread = table.loc["random", "loss"], table["loss_sd"].fillna(0)["random"]
        axes.axvspan(chance - 2 * spread, chance + 2 * spread, color=GREY, alpha=0.2, linewidth=0)
        axes.axvline(table.loc["all fine", "loss"], color=GREY, linewidth=0.8, linestyle="--")
        for row, (label, values) in enumerate(table.iterrows()):
            axes.hlines(row, *sorted((chance, values["loss"])), color=GREY, linewidth=1)
            colour = VERMILION if label.startswith(SEARCHED) else BLUE if label == "gate" else GREY
            axes.plot(values["loss"], row, "o", color=colour)
            text = f"{values['loss']:.3f}, {100 * values['accuracy']:.1f} %"
            axes.annotate(text, (values["loss"], row), (0, 6), textcoords="offset points", ha="center", fontsize=7)
        axes.set_yticks(range(len(table)), table.index, fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.18, y=0.12)
        axes.set_xlabel("loss (and accuracy) on these pictures")
        axes.set_title(name, fontsize=10)
    return figure


def agreement(tables: Mapping[str, Mapping[str, Tensor]]) -> Figure:
    """Draw how scores rank the regions of a picture against what these are worth, a panel for each model.

    Args:
        tables: Model -> who gives the scores -> Spearman's correlation in each picture, `[B]`; NaN is left out.
    """
    figure, panels = plt.subplots(
        1, len(tables), figsize=(4.2 * len(tables), 3.4), layout="constrained", squeeze=False, sharey=True
    )
    for axes, (name, correlations) in zip(panels[0], tables.items(), strict=True):
        values = [v[~v.isnan()].numpy() for v in correlations.values()]
        axes.axhline(0, color=GREY, linewidth=0.8)
        axes.boxplot(values, tick_labels=list(correlations), showmeans=True, widths=0.6)
        axes.set_title(name, fontsize=10)
    panels[0, 0].set_ylabel("rank correlation with the loss that\nregions save if they stay fine")
    return figure


def decidedness(histories: Mapping[str, pd.DataFrame], gates: Mapping[str, Tensor]) -> Figure:
    """Draw the share of decided gates over the epochs, and how the soft gates lie in the end.

    Args:
        histories: Model -> a run's metrics by epoch, with `epoch` and `val_decided`.
        gates: Model -> soft decisions of any shape.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 3.4), layout="constrained")
    for name, look in looks(histories).items():
        history = histories[name]
        left.plot(history["epoch"], 100 * history["val_decided"], label=look.name, **look.line)
        values = gates[name].flatten().numpy()
        share = np.full(len(values), 100 / len(values))
        right.hist(values, np.linspace(0, 1, 21), weights=share, histtype="step", color=look.color, label=look.name)
    left.set(xlabel="epoch", ylabel="m outside of 0.25 to 0.75 (% of the regions)", ylim=(0, 102))
    left.xaxis.get_major_locator().set_params(integer=True)
    left.legend(fontsize=8, frameon=False)
    right.axvspan(0.25, 0.75, color=GREY, alpha=0.12, linewidth=0)
    right.set(xlabel="soft gate m without noise: 0 fine, 1 coarse", ylabel="share of the regions (%)", xlim=(0, 1))
    return figure


def pulls(signals: Mapping[str, tuple[Tensor, Tensor]]) -> Figure:
    """Draw the distribution of what a step's gradient says of a score: its mean over the noise by its deviation.

    Args:
        signals: Model -> mean and standard deviation over the noise of the task's pull at each score.
    """
    figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    for name, look in looks(signals).items():
        mean, spread = signals[name]
        ratio = (mean.abs() / spread.clamp(min=1e-12)).flatten().sort().values.numpy()
        heights = np.linspace(0, 100, len(ratio))
        label = f"{look.name}: median {np.median(ratio):.2f}"
        axes.plot(ratio, heights, color=look.color, label=label)
    axes.axvline(1, color=GREY, linewidth=0.8, linestyle="--")
    axes.set(xscale="log", xlim=(0.01, 3), ylim=(0, 100), ylabel="share of the regions (%)")
    axes.set_xlabel("|mean pull of the task| / its standard deviation over the noise")
    axes.legend(fontsize=8, frameon=False)
    return figure


def worth_maps(images: Tensor, worth: Tensor, scores: Mapping[str, Tensor], drawing: PictureStyle) -> Figure:
    """Draw pictures, what their regions are worth, and who ranks them how: bright is what should stay fine.

    Args:
        images: Normalised, `[B, 3, H, W]`.
        worth: The loss that a region saves if it stays fine, `[B, h, w]`; red, blue where it is better coarse.
        scores: Who -> scores `[B, h, w]`, the highest to be coarse first.
    """
    names = ["picture", "loss saved\nif fine", *scores]
    figure, grid = plt.subplots(len(names), len(images), figsize=(1.5 * len(images), 1.55 * len(names)), **PICTURE_GRID)
    extreme = worth.abs().flatten(1).max(1).values.clamp(min=1e-9)
    for column, image in enumerate(images):
        drawing.draw(grid[0, column], image)
        most = float(extreme[column])
        grid[1, column].imshow(worth[column].numpy(), cmap="RdBu_r", vmin=-most, vmax=most)
        grid[1, column].set_xlabel(f"± {most:.2g}", fontsize=7)
        for axes, values in zip(grid[2:, column], scores.values(), strict=True):
            axes.imshow(-values[column].float().numpy(), cmap="cividis")
    for axes, name in zip(grid[:, 0], names, strict=True):
        axes.set_ylabel(name, fontsize=9)
    return figure
