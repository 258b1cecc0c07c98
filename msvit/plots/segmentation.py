"""Figures of segmentations: their quality against their cost, and label maps beside pictures."""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from ..data import IGNORE
from .looks import draw_means
from .style import COLOURS, PICTURE_GRID, VERMILION, PictureStyle


def quality(table: pd.DataFrame) -> Figure:
    """Draw mIoU and accuracy near edges against MACs, and how much of the boundaries lies in fine regions."""
    figure, grid = plt.subplots(1, 3, figsize=(12.6, 3.8), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    pairs = (("macs", "miou"), ("macs", "band_accuracy"), ("fine", "boundary_fine"))
    for axes, (across, up) in zip(grid, pairs, strict=True):
        draw_means(axes, table[across] * 100, table[up] * 100, table["method"], markersize=7)
        axes.grid(alpha=0.3)
    macs = "MACs per picture, gate and decoder included\n(% of the all-fine model's)"
    grid[0].set(xlabel=macs, ylabel="mIoU (%)")
    grid[1].set(xlabel=macs, ylabel="pixel accuracy within 4 px of an edge (%)")
    grid[2].plot([0, 100], [0, 100], color="grey", linestyle="--", linewidth=1)
    grid[2].set(xlabel="pixels in fine regions (%)", ylabel="boundary pixels in fine regions (%)")
    grid[2].text(98, 62, "as by chance", fontsize=8, color="grey", ha="right")
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    return figure


def segmentation_maps(
    images: Tensor, coarse: Tensor, tokens: Tensor, targets: Tensor, predicted: Tensor, drawing: PictureStyle
) -> Figure:
    """Draw pictures in columns: tokens, truth, prediction and error one below the other.

    Args:
        images: Normalised, `[B, 3, H, W]`.
        coarse: Decisions, bool `[B, h, w]`.
        tokens: How many each picture has, `[B]`.
        targets, predicted: Classes of pixels, `[B, H, W]`.
    """
    names = ["tokens", "truth", "prediction", "error"]
    size = (1.9 * len(images), 1.95 * len(names))
    figure, grid = plt.subplots(len(names), len(images), figsize=size, **PICTURE_GRID)
    for column, image in enumerate(images):
        drawing.draw(grid[0, column], image, coarse[column])
        limits = {"xlim": (-0.5, image.shape[2] - 0.5), "ylim": (image.shape[1] - 0.5, -0.5)}
        grid[0, column].set(**limits, xlabel=f"{int(tokens[column])} tokens")
        for row, labels in ((1, targets[column]), (2, predicted[column])):
            grid[row, column].imshow(label_colours(labels), interpolation="nearest")
        wrong = (predicted[column] != targets[column]) & (targets[column] != IGNORE)
        grey = drawing.pixels(image).mean(2)
        grid[3, column].imshow(grey, cmap="gray", vmin=-0.5, vmax=1.5, interpolation="nearest")
        grid[3, column].imshow(np.where(wrong, 1.0, np.nan), cmap=ListedColormap([VERMILION]), interpolation="nearest")
        grid[3, column].set_xlabel(f"{100 * wrong.double().mean():.1f} % wrong")
    for row, name in enumerate(names):
        grid[row, 0].set_ylabel(name)
    return figure


def label_colours(labels: Tensor) -> np.ndarray:
    """Return a label map `[H, W]` in colours `[H, W, 3]`: the first class grey, ignored pixels white."""
    hues = ["#DDDDDD", *(COLOURS[k % len(COLOURS)] for k in range(IGNORE - 1)), "white"]
    return np.array([to_rgb(hue) for hue in hues])[labels.numpy()]
