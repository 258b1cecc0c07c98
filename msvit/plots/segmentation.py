"""Figures of segmentations: their quality against their cost, and label maps beside pictures."""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from ..data import IGNORE
from .style import COLOURS, VERMILION, draw_grid, style, to_pixels


def quality(table: pd.DataFrame) -> Figure:
    """Draw mIoU and accuracy near edges against MACs, and how much of the boundaries lies in fine regions."""
    figure, grid = plt.subplots(1, 3, figsize=(12.6, 3.8), layout="constrained")
    figure.get_layout_engine().set(wspace=0.06)
    pairs = (("macs", "miou"), ("macs", "band_accuracy"), ("fine", "boundary_fine"))
    for axes, (across, up) in zip(grid, pairs, strict=True):
        for index, (method, part) in enumerate(table.groupby("method", sort=False)):
            x, y = part[across] * 100, part[up] * 100
            spread = {"xerr": x.std(), "yerr": y.std()} if len(part) > 1 else {}
            label = method if axes is grid[0] else None
            axes.errorbar(
                x.mean(), y.mean(), **spread, **style(index), markersize=7, capsize=3, linestyle="", label=label
            )
        axes.grid(alpha=0.3)
    macs = "MACs per picture, gate and decoder included\n(% of the all-fine model's)"
    grid[0].set(xlabel=macs, ylabel="mIoU (%)")
    grid[1].set(xlabel=macs, ylabel="pixel accuracy within 4 px of an edge (%)")
    grid[2].plot([0, 100], [0, 100], color="grey", linestyle="--", linewidth=1)
    grid[2].set(xlabel="pixels in fine regions (%)", ylabel="boundary pixels in fine regions (%)")
    grid[2].text(98, 62, "as by chance", fontsize=8, color="grey", ha="right")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def segmentation_maps(
    images: Tensor,
    coarse: Tensor,
    tokens: Tensor,
    targets: Tensor,
    predicted: Tensor,
    classes: int,
    patch: int,
    scale: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Figure:
    """Draw pictures in columns: tokens, truth, prediction and error one below the other.

    Args:
        images: Normalised, `[B, 3, H, W]`.
        coarse: Decisions, bool `[B, h, w]`.
        tokens: How many each picture has, `[B]`.
        targets, predicted: Classes of pixels, `[B, H, W]`.
    """
    names = ["tokens", "truth", "prediction", "error"]
    shape = (len(names), len(images))
    figure, grid = plt.subplots(*shape, figsize=(1.9 * shape[1], 1.95 * shape[0]), squeeze=False, layout="constrained")
    for column, image in enumerate(images):
        shown = to_pixels(image, mean, std)
        grid[0, column].imshow(shown, interpolation="nearest")
        draw_grid(grid[0, column], coarse[column], patch, scale)
        limits = {"xlim": (-0.5, image.shape[2] - 0.5), "ylim": (image.shape[1] - 0.5, -0.5)}
        grid[0, column].set(**limits, xlabel=f"{int(tokens[column])} tokens")
        for row, labels in ((1, targets[column]), (2, predicted[column])):
            grid[row, column].imshow(label_colours(labels, classes), interpolation="nearest")
        wrong = (predicted[column] != targets[column]) & (targets[column] != IGNORE)
        grid[3, column].imshow(shown.mean(2), cmap="gray", vmin=-0.5, vmax=1.5, interpolation="nearest")
        grid[3, column].imshow(np.where(wrong, 1.0, np.nan), cmap=ListedColormap([VERMILION]), interpolation="nearest")
        grid[3, column].set_xlabel(f"{100 * wrong.double().mean():.1f} % wrong")
    for row, name in enumerate(names):
        grid[row, 0].set_ylabel(name)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return figure


def label_colours(labels: Tensor, classes: int) -> np.ndarray:
    """Return a label map `[H, W]` in colours `[H, W, 3]`: the first class grey, ignored pixels white."""
    hues = ["#DDDDDD", *(COLOURS[k % len(COLOURS)] for k in range(classes - 1))]
    table = np.array([[int(hue[i : i + 2], 16) / 255 for i in (1, 3, 5)] for hue in hues] + [[1.0] * 3])
    return table[np.where(labels.numpy() == IGNORE, classes, labels.numpy())]
