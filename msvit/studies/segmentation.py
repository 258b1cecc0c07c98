"""The study of the dense task: what mixed-scale tokens cost a segmentation, where, and whether gates find detail."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor

from ..data import IGNORE
from ..models.msvit import MSViT
from ..plots.runs import COLOURS, draw_grid, style, to_pixels
from ..training import runs
from ..training.build import load_data
from .study import Row

COLUMNS = (
    "miou",
    "accuracy",
    "band_accuracy",
    "macs",
    "gmacs",
    "gmacs_sd",
    "fine",
    "boundary_fine",
    "coarse",
    "seconds",
)


def rows(budgets: Iterable[float], masks: Iterable[str] = ("random",)) -> list[Row]:
    """All fine and all coarse, and at each budget the gate and masks that are not learned; all on the same schedule."""
    made = [Row("all fine", {"gating": "fine"}), Row("all coarse", {"gating": "coarse"})]
    for budget in budgets:
        made.append(Row(f"gate at {budget:.0%}", {"target": budget}))
        made += [Row(f"{mask} at {budget:.0%}", {"target": budget, "gating": mask}) for mask in masks]
    return made


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds of what matters here, and with several seeds the spread of the quality and of the cost."""
    columns = [name for name in COLUMNS if name in table]
    grouped = table.groupby("method", sort=False)
    out = grouped[columns].mean()
    out.insert(0, "seeds", grouped.size())
    for name in ("miou", "band_accuracy", "macs"):
        out[f"{name} ±"] = grouped[name].std(ddof=1)
    return out.dropna(axis=1, how="all")


def class_ious(table: pd.DataFrame) -> pd.DataFrame:
    """IoU of each class (columns) by method (rows), mean over seeds."""
    by_class = pd.DataFrame(list(table["iou"]), index=table["method"]).astype(float)
    return by_class.groupby(level=0, sort=False).mean()


def quality(table: pd.DataFrame) -> Figure:
    """mIoU and accuracy near edges against MACs, and how much of the boundaries lies in fine regions."""
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


@torch.no_grad()
def pictures(folder: str | Path, count: int = 6) -> Figure:
    """The first validation pictures of a run: tokens, truth, prediction and error side by side."""
    recipe, model = runs.read(folder).recipe, MSViT.from_pretrained(folder, fast_cpu=True)
    loaders = load_data(recipe.data, recipe.training.seed, model)
    images, targets, _ = next(iter(loaders.val))
    images, targets = images[:count], targets[:count]
    result = model.run(images)
    found = result.logits.argmax(1)
    names = ["tokens", "truth", "prediction", "error"]
    shape = (len(names), len(images))
    figure, grid = plt.subplots(*shape, figsize=(1.9 * shape[1], 1.95 * shape[0]), squeeze=False, layout="constrained")
    for column, image in enumerate(images):
        shown = to_pixels(image, loaders.mean, loaders.std)
        grid[0, column].imshow(shown, interpolation="nearest")
        draw_grid(grid[0, column], result.coarse[column], model.coarse_patch, model.scale)
        limits = {"xlim": (-0.5, image.shape[2] - 0.5), "ylim": (image.shape[1] - 0.5, -0.5)}
        grid[0, column].set(**limits, xlabel=f"{int(result.tokens[column])} tokens")
        for row, labels in ((1, targets[column]), (2, found[column])):
            grid[row, column].imshow(colour_map(labels, len(model.head.classes)), interpolation="nearest")
        wrong = (found[column] != targets[column]) & (targets[column] != IGNORE)
        grid[3, column].imshow(shown.mean(2), cmap="gray", vmin=-0.5, vmax=1.5, interpolation="nearest")
        grid[3, column].imshow(np.where(wrong, 1.0, np.nan), cmap=ListedColormap(["#D55E00"]), interpolation="nearest")
        grid[3, column].set_xlabel(f"{100 * wrong.double().mean():.1f} % wrong")
    for row, name in enumerate(names):
        grid[row, 0].set_ylabel(name)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    return figure


def colour_map(labels: Tensor, classes: int) -> np.ndarray:
    """Label map `[H, W]` in colours `[H, W, 3]`: the first class grey, the others as in the figures, ignored white."""
    hues = ["#DDDDDD", *(COLOURS[k % len(COLOURS)] for k in range(classes - 1))]
    table = np.array([[int(hue[i : i + 2], 16) / 255 for i in (1, 3, 5)] for hue in hues] + [[1.0] * 3])
    return table[np.where(labels.numpy() == IGNORE, classes, labels.numpy())]
