"""Figures of the methods' papers: where MACs go, what attention smooths, what reducers lose and keep, and fronts."""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib import colormaps
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from .looks import legend_beside, looks
from .style import COLOURS, COSTS, GREY, PICTURE_GRID, PictureStyle

# Where the names of a front's points stand, in turns, so that those of neighbours do not meet: offset and alignment.
BESIDE = (((0, 6), "center"), ((0, -12), "center"), ((6, -3), "left"), ((-6, -3), "right"))


def cost_shares(table: pd.DataFrame) -> Figure:
    """Draw which part of the network the MACs go to, and the share of attention's products by the picture's side.

    Args:
        table: `model`, `size` (px), `macs`, and a share of these in each other column, of which one is "attention's
            products".
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 3.8), layout="constrained")
    first = table.drop_duplicates("model")
    names = [f"{row.model}\n{row.size} px, {giga(row.macs)}" for row in first.itertuples()]
    start = 0 * first["macs"]
    for part, colour in zip(table.columns.drop(["model", "size", "macs"]), COLOURS, strict=False):
        left.barh(names, first[part] * 100, left=start * 100, color=colour, label=part)
        start = start + first[part]
    left.set(xlabel="share of the MACs (%)", xlim=(0, 100))
    left.invert_yaxis()
    left.tick_params(axis="y", labelsize=8)
    left.legend(loc="lower center", bbox_to_anchor=(0.4, 1), ncols=3, fontsize=8, frameon=False)
    for model, look in looks(table["model"]).items():
        sizes = table[table["model"] == model]
        right.plot(sizes["size"], sizes["attention's products"] * 100, label=model, **look.line)
    right.set(xlabel="side of the picture (pixels)", ylabel="attention's products (% of the MACs)", ylim=(0, None))
    right.grid(alpha=0.3)
    right.legend(fontsize=8, frameon=False)
    return figure


def low_pass(response: Tensor, singular: Tensor, similarity: Tensor) -> Figure:
    """Draw what attention does to tokens, a line per block: by frequency, by singular values, and to their likeness.

    Args:
        response: `[depth, F]`, amplitude after / before at the spatial frequencies 0 ... F-1.
        singular: `[depth, N]`, of the attention matrix, falling.
        similarity: `[depth, 3]`, mean cosine between patch tokens before a block, after its attention, after its MLP.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.6, 3.6), layout="constrained")
    colours = colormaps["viridis"].resampled(len(response) + 1)
    for layer, (by_frequency, values) in enumerate(zip(response, singular, strict=True)):
        line = {"color": colours(layer), "label": f"block {layer}"}
        left.plot(by_frequency, "o-", markersize=4, **line)
        middle.plot(range(1, len(values) + 1), values / values[0], **line)
    left.axhline(1, color=GREY, linewidth=0.8, linestyle="--")
    left.set(xlabel="spatial frequency (cycles per picture)", ylabel="amplitude after / before attention", yscale="log")
    middle.set(xlabel="number", ylabel="singular value of attention (largest = 1)", yscale="log", ylim=(1e-4, 1.5))
    steps = [layer + offset for layer in range(len(similarity)) for offset in (0, 1 / 3, 2 / 3)]
    right.plot(steps, similarity.flatten(), "-", color=GREY)
    for index, look in enumerate(looks(("before the block", "after attention", "after the MLP")).values()):
        right.plot(steps[index::3], similarity[:, index], linestyle="", label=look.name, **look.line)
    right.set(xlabel="block", ylabel="cosine between two patch tokens (mean)")
    right.xaxis.get_major_locator().set_params(integer=True)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)
    return figure


def reconstruction(table: pd.DataFrame) -> Figure:
    """Draw what reducers lose of the tokens in each block where they act, and what they lose in all.

    Args:
        table: `method`, `layer`, `error` (a share of the tokens' variance), `accuracy`.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.2), layout="constrained")
    for method, look in looks(table["method"]).items():
        layers = table[table["method"] == method]
        left.plot(layers["layer"], layers["error"] * 100, label=look.name, **look.line)
        total = 100 * layers["error"].sum(), 100 * layers["accuracy"].iloc[0]
        right.plot(*total, linestyle="", **look.line)
    left.set(xlabel="block", ylabel="reconstruction error (% of the tokens' variance)", ylim=(0, None))
    left.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="sum over the blocks (% of the tokens' variance)", ylabel="accuracy without training (%)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    legend_beside(figure)
    return figure


def fronts(table: pd.DataFrame) -> Figure:
    """Draw accuracy against MACs, a line per series through the means of its points over seeds.

    Args:
        table: `series`, `point` (of a series, such as "32 px"), `accuracy`, `macs` (of a picture, absolute).
    """
    figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
    unit, name = (1e9, "GMACs") if table["macs"].max() >= 1e9 else (1e6, "MMACs")
    styles = defaultdict(lambda: itertools.cycle(("-", "--", ":", "-.")))  # of one method on several backbones
    for index, (series, look) in enumerate(looks(table["series"]).items()):
        runs = table[table["series"] == series]
        points = runs.groupby("point", sort=False)
        mean = points[["macs", "accuracy"]].mean().sort_values("macs")
        spread = points["accuracy"].std().loc[mean.index].fillna(0) * 100
        x, y = mean["macs"] / unit, mean["accuracy"] * 100
        line = {"linewidth": 1, "linestyle": next(styles[look.color, look.marker])} | look.line
        axes.errorbar(x, y, spread, markersize=6, capsize=2, label=look.name, **line)
        offset, side = BESIDE[index % len(BESIDE)]
        text = {"ha": side, "fontsize": 7, "color": look.color, "textcoords": "offset points"}
        for point, *place in zip(mean.index, x, y, strict=True):
            axes.annotate(point, place, offset, **text)
    axes.set(xscale="log", xlabel=f"{name} per picture, gate and reducer included", ylabel="accuracy (%)")
    axes.margins(x=0.2, y=0.12)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    legend_beside(figure)
    return figure


def beside_baselines(table: pd.DataFrame, baselines: Sequence[str], x: str = "macs") -> Figure:
    """Draw accuracy against cost in a panel per method, its curve over budgets beside those that it has to beat.

    Curves go through the means over seeds; bands are one standard deviation to either side.

    Args:
        table: `series`, `method` (the rows that are points of a series), `accuracy`, and the cost `x`.
        baselines: Series that are in every panel, as far as there are any.
    """
    known = looks(table["series"])
    shared = [name for name in baselines if name in known]
    methods = [name for name in known if name not in shared and name != "dense"] or shared
    columns = min(4, len(methods))
    rows = math.ceil(len(methods) / columns)
    figure = plt.figure(figsize=(3 * columns + 0.6, 2.5 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    factor, title = COSTS[x]
    for number, (axes, method) in enumerate(itertools.zip_longest(grid.flat, methods)):
        if method is None:
            axes.set_axis_off()
            continue
        for series in (*shared, method):
            points = table[table["series"] == series].groupby("method")
            mean = points[[x, "accuracy"]].mean().sort_values(x)
            spread = points["accuracy"].std(ddof=1).loc[mean.index].fillna(0)
            low, high = 100 * (mean["accuracy"] - spread), 100 * (mean["accuracy"] + spread)
            look, own = known[series], series == method
            style = {"linewidth": 1.6 if own else 1, "markersize": 6 if own else 3, "alpha": 1 if own else 0.7}
            axes.plot(factor * mean[x], 100 * mean["accuracy"], **look.line, **style, label=look.name)
            axes.fill_between(factor * mean[x], low, high, color=look.color, alpha=0.15, linewidth=0)
        axes.set_title(known[method].name, fontsize=9)
        axes.tick_params(labelbottom=number + columns >= len(methods))
        axes.grid(alpha=0.3)
    figure.supxlabel(title, fontsize=9)
    figure.supylabel("accuracy (%)", fontsize=9)
    handles = [plt.Line2D([], [], **known[name].line, markersize=4) for name in shared]
    names = [known[name].name for name in shared]
    grid[0, 0].legend(handles, names, loc="lower right", fontsize=7, frameon=False)
    return figure


def stage_maps(images: Tensor, stages: Mapping[str, Tensor], drawing: PictureStyle) -> Figure:
    """Draw how many tokens a patch has after each stage: in some pictures, and on average over all.

    Args:
        images: Normalised, `[n, 3, H, W]`; the first of all B pictures.
        stages: Name -> tokens per fine patch, `[B, H_f, W_f]`: 1 has its own, 1/n is one of n that share one, 0 has
            none.
    """
    rows, columns = len(stages), len(images) + 1
    figure, grid = plt.subplots(rows, columns, figsize=(1.6 * columns + 0.8, 1.75 * rows), **PICTURE_GRID)
    for row, (name, share) in zip(grid, stages.items(), strict=True):
        side = images.shape[-2] // share.shape[1]
        for axes, image, tokens in zip(row, images, share, strict=False):
            there = tokens.repeat_interleave(side, 0).repeat_interleave(side, 1)[..., None].numpy()
            axes.imshow(drawing.pixels(image) * there + 1 - there, interpolation="nearest")
            axes.set_xlabel(f"{tokens.sum():.0f} patch tokens", fontsize=8)
        shown = row[-1].imshow(share.mean(0).numpy(), vmin=0, vmax=1, cmap="cividis")
        row[-1].set_xlabel(f"mean {share.sum((1, 2)).mean():.1f}", fontsize=8)
        row[0].set_ylabel(name, fontsize=9)
    grid[0, -1].set_title(f"mean over {len(share)}", fontsize=8)
    figure.colorbar(shown, ax=grid[:, -1], label="tokens per patch", shrink=0.8)
    return figure


def giga(macs: float) -> str:
    """Return MACs in words, in GMACs or MMACs."""
    return f"{macs / 1e9:.1f} GMACs" if macs >= 1e9 else f"{macs / 1e6:.1f} MMACs"
