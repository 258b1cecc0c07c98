"""Learning curves: what the lines of a run's metrics say, epoch by epoch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import BLUE, GREY, VERMILION

# Panel -> the names of its lines in training and on validation pictures, and what they are multiplied with.
CURVES = {
    "loss": ("train_loss", "val_loss", 1),
    "accuracy (%)": ("train_accuracy", "val_accuracy", 100),
    "mIoU (%)": ("train_miou", "val_miou", 100),
    "coarse regions (%)": ("train_coarse", "val_coarse", 100),
    "MACs (% of dense)": ("train_macs", "val_macs", 100),
}


def learning_curves(metrics: Sequence[dict[str, Any]]) -> Figure:
    """Draw loss, accuracy, rate and MACs of a run by epoch, in training and on validation pictures.

    Args:
        metrics: The lines of `metrics.jsonl`, as `training.runs.read` has them and `watch` is given them.
    """
    shown = [panel for panel, (_, name, _) in CURVES.items() if any(name in line for line in metrics)]
    figure, grid = plt.subplots(1, len(shown), figsize=(3.1 * len(shown), 2.6), squeeze=False, layout="constrained")
    dense = sum(line["stage"] == "dense" for line in metrics)
    for axes, panel in zip(grid[0], shown, strict=True):
        _panel(axes, metrics, *CURVES[panel])
        axes.set(title=panel, xlabel="epoch")
        axes.title.set_fontsize(9)
        if 0 < dense < len(metrics):
            axes.axvline(dense, color=GREY, linewidth=0.8, linestyle=":")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    grid[0, 0].legend(fontsize=7, frameon=False)
    return figure


def _panel(axes: Axes, metrics: Sequence[dict[str, Any]], training: str, validation: str, factor: float):
    """Draw both lines; of the loss in training all points of the epochs' curves."""
    epochs = np.array([line["epoch"] for line in metrics])
    if training == "train_loss" and all("curve" in line for line in metrics):
        steps = [np.arange(1, len(line["curve"]) + 1) / len(line["curve"]) for line in metrics]
        at = np.concatenate([epoch - 1 + step for epoch, step in zip(epochs, steps, strict=True)])
        axes.plot(at, [value for line in metrics for value in line["curve"]], color=BLUE, linewidth=1, label="training")
    else:
        axes.plot(epochs, [factor * line.get(training, np.nan) for line in metrics], color=BLUE, label="training")
    found = [factor * line.get(validation, np.nan) for line in metrics]
    axes.plot(epochs, found, "o-", color=VERMILION, markersize=3, linewidth=1, label="validation")
