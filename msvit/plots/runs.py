"""Figures of what runs did: gate maps, accuracy against MACs, token counts; each function returns a figure."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from ..core.tokens import shrink

# Okabe and Ito's colours, which readers with any colour vision tell apart; and markers, for those who print in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933", "#882255", "#44AA99")
MARKERS = "osD^vP*Xph"
FINE, COARSE = "#56B4E9", "#E69F00"


def style(index: int) -> dict:
    """Colour and marker of the index-th method, the same in every figure of a report."""
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]}


def save(figure: Figure, folder: str | Path, name: str, kinds: tuple[str, ...] = ("png", "svg")) -> Figure:
    """Writes the figure under a folder, without dates inside, so that the same figure gives the same bytes."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with plt.rc_context({"svg.hashsalt": "msvit"}):
        for kind in kinds:
            figure.savefig(Path(folder) / f"{name}.{kind}", dpi=150, bbox_inches="tight", metadata=dates.get(kind, {}))
    return figure


def to_pixels(image: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """A normalised picture `[3, H, W]` as floats in [0, 1], `[H, W, 3]`."""
    mean, std = (torch.tensor(v, dtype=image.dtype).view(-1, 1, 1) for v in (mean, std))
    return (image.detach().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def as_the_model_sees(image: Tensor, coarse: Tensor, scale: int) -> Tensor:
    """The picture `[c, H, W]` with the regions `[h, w]` that are coarse at 1 / scale of the resolution."""
    reduced = F.interpolate(shrink(image[None], scale), scale_factor=scale, mode="nearest")[0]
    rows, columns = image.shape[1] // coarse.shape[0], image.shape[2] // coarse.shape[1]
    pixels = coarse.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return torch.where(pixels, reduced, image)


def draw_grid(axes, coarse: Tensor, patch: int, scale: int):
    """The borders of the tokens: a frame round each coarse region, a cross of thin lines in each fine one."""
    lines = {True: [], False: []}
    for r, c in np.ndindex(*coarse.shape):
        top, left = r * patch, c * patch
        kind = bool(coarse[r, c])
        steps = [0, patch] if kind else [patch * i / scale for i in range(scale + 1)]
        lines[kind] += [[(left + s, top), (left + s, top + patch)] for s in steps]
        lines[kind] += [[(left, top + s), (left + patch, top + s)] for s in steps]
    shift = -0.5  # a pixel's centre is its integer coordinate
    for kind, colour, width in ((True, COARSE, 1.2), (False, FINE, 0.9)):
        segments = [[(x + shift, y + shift) for x, y in line] for line in lines[kind]]
        axes.add_collection(LineCollection(segments, colors=colour, linewidths=width))


def gate_maps(
    images: Tensor,
    decisions: Mapping[str, Tensor],
    patch: int,
    scale: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    seen: bool = True,
) -> Figure:
    """Pictures in columns; a row for the pictures, one for each method's tokens, and what the first method sees.

    Args:
        images: Normalised, `[B, 3, H, W]`.
        decisions: Method -> coarse regions, bool `[B, h, w]`.
        patch: Side of a coarse patch in pixels.
        seen: Add the row with coarse regions at their real resolution.
    """
    names = ["picture", *decisions, *(["as the model sees it"] if seen else [])]
    figure, grid = plt.subplots(
        len(names), len(images), figsize=(1.7 * len(images), 1.75 * len(names)), squeeze=False, layout="constrained"
    )
    first = next(iter(decisions.values())).cpu()
    for row, name in enumerate(names):
        for column, image in enumerate(images):
            axes = grid[row, column]
            shown = as_the_model_sees(image, first[column], scale) if row == len(decisions) + 1 else image
            axes.imshow(to_pixels(shown, mean, std), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if name in decisions:
                coarse = decisions[name][column].cpu()
                draw_grid(axes, coarse, patch, scale)
                tokens = int(coarse.sum() + (~coarse).sum() * scale**2)
                axes.set_xlabel(f"{tokens} patch tokens", fontsize=8)
        grid[row, 0].set_ylabel(textwrap.fill(name, 18), fontsize=9)
    return figure


COSTS = {
    "macs": (100, "MACs per picture, gate included (% of the dense model's)"),
    "pictures_per_s": (1, "pictures per second on this machine"),
}


def tradeoff(table: pd.DataFrame, by: str = "method", curves: pd.DataFrame | None = None, x: str = "macs") -> Figure:
    """Accuracy against a cost of COSTS, a point per method: mean over seeds, bars of one standard deviation.

    Args:
        curves: Points of single models at several thresholds, as dotted lines: `run`, `accuracy`, `macs`.
    """
    factor, title = COSTS[x]
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for index, (method, runs) in enumerate(table.groupby(by, sort=False)):
        cost, accuracy = runs[x] * factor, runs["accuracy"] * 100
        spread = {"xerr": cost.std(), "yerr": accuracy.std()} if len(runs) > 1 else {}
        axes.errorbar(
            cost.mean(), accuracy.mean(), **spread, **style(index), markersize=8, capsize=3, linestyle="", label=method
        )
    for _, points in curves.groupby("run", sort=False) if curves is not None else ():
        axes.plot(points[x] * factor, points["accuracy"] * 100, ":", color="#666666", zorder=0)
    axes.set(xlabel=title, ylabel="accuracy (%)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def token_counts(counts: Mapping[str, Tensor], lowest: int, highest: int) -> Figure:
    """How many tokens each picture gets, a row per method: from all coarse (`lowest`) to all fine (`highest`)."""
    figure, grid = plt.subplots(
        len(counts), 1, figsize=(6.4, 0.9 + 0.75 * len(counts)), sharex=True, squeeze=False, layout="constrained"
    )
    bins = np.linspace(lowest, highest, 33)
    for index, (name, values) in enumerate(counts.items()):
        axes, values = grid[index, 0], values.double().cpu().numpy()
        axes.hist(values, bins=bins, color=style(index)["color"])
        axes.axvline(values.mean(), color="black", linestyle="--", linewidth=1)
        axes.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axes.set_yticks([])
        told = f"{values.mean():.1f} ± {values.std():.1f}"
        axes.text(0.99, 0.8, told, transform=axes.transAxes, ha="right", fontsize=8)
    grid[-1, 0].set_xlabel(f"tokens of a picture ({lowest} = all coarse, {highest} = all fine; dashed: the mean)")
    return figure


def front(trials: pd.DataFrame) -> Figure:
    """A sweep's finished trials, and the line of those that no other beats in accuracy and MACs."""
    done = trials.dropna(subset=["accuracy"])
    best = done[done["front"]].sort_values("macs")
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axes.plot(done["macs"] * 100, done["accuracy"] * 100, "o", color=COLOURS[5], label="trials")
    axes.plot(best["macs"] * 100, best["accuracy"] * 100, "-D", color=COLOURS[1], label="Pareto front")
    axes.set(xlabel=COSTS["macs"][1], ylabel="accuracy on held-out pictures (%)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def importance(shares: Mapping[str, float]) -> Figure:
    """How much of the score's variance each setting explains."""
    figure, axes = plt.subplots(figsize=(6.4, 0.8 + 0.35 * len(shares)), layout="constrained")
    names = sorted(shares, key=shares.__getitem__)
    axes.barh([n.removeprefix("loss_settings.") for n in names], [100 * shares[n] for n in names], color=COLOURS[0])
    axes.set_xlabel("share of the score's variance (%), by fANOVA")
    return figure
