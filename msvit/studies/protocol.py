"""Results on real pictures: the rows of the protocol, and where gates look and what they get wrong.

Every row but the dense model starts from the seed's dense model and is trained on for as many epochs as the others.
`reports/real/protocol.md` says what is run, and why.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from ..core.macs import vit_macs
from ..plots.runs import as_the_model_sees, draw_grid, to_pixels
from ..training.build import build
from ..training.recipe import Recipe
from .inspect import Look, worth
from .study import FULL, Row, methods, run_rows

LIGHT = f"{FULL}, gbas, light"  # chosen on held-out training pictures, after the first results
REDUCED = ("dense, trained on", f"{FULL}, gbas", LIGHT, f"{FULL}, l0", "random mask", "dynamicvit", "tome")
BUDGETS = (0.5, 0.75)
COMPARED = ("dynamicvit", "token_pooling", "evit", "tome", "gate+dynamicvit", "gate+tome")


def rows(base: Recipe, full: bool, lr: float) -> list[Row]:
    """The rows of the full protocol, or those of the reduced one; all with the learning rate of the second stage."""
    size = smaller(base)
    found = [
        Row("dense, trained on", {"gating": "fine"}),
        Row("dense, all coarse", {"gating": "coarse"}),
        Row(f"dense at {size} px", {"gating": "fine", "size": size}, dense=False),
        *(Row(f"{FULL}, {loss}", {"loss": loss}) for loss in ("gbas", "bas", "l0", "ratio")),
        Row(LIGHT, {"loss_weight": 1.0, "loss_settings": {"temperature": 0.1}}),
        Row(f"{FULL}, gbas, untrimmed", {"trim": False}),
        *(Row(f"{FULL}, gbas at {budget:g}", {"target": budget}) for budget in BUDGETS),
        *(Row(f"{mask} mask", {"gating": mask}) for mask in ("random", "centre", "entropy")),
        *methods(COMPARED, base),
    ]
    if not full:
        found = [row for row in found if row.label in REDUCED]
    return [Row(row.label, row.changes | ({"lr": lr} if row.dense else {}), row.dense) for row in found]


def smaller(base: Recipe) -> int:
    """The side of the pictures on which the dense model's MACs are nearest to the target."""
    model = build(base, Path())
    patch, vit = model.coarse_patch, model.vit
    sides = torch.arange(patch, base.data.size + 1, patch)
    tokens = vit.num_prefix_tokens + (sides // vit.patch_embed.patch_size[0]) ** 2
    shares = vit_macs(vit, tokens) / model.dense_macs((base.data.size, base.data.size))
    return int(sides[(shares - base.gating.target).abs().argmin()])


def run(base: Recipe, full: bool, lr: float, seeds: Iterable[int], folder: Path) -> pd.DataFrame:
    """Trains what is not there yet; MACs of all rows as shares of the dense model's at the full picture size."""
    table = run_rows(base, rows(base, full, lr), seeds, folder)
    dense = table.loc[table["method"] == "dense", "dense_macs"].iloc[0]
    for column in ("macs", "macs_sd"):
        table[column] *= table["dense_macs"] / dense
    return table


def positions(looks: Mapping[str, Look]) -> Figure:
    """How often each place of a picture is fine, a panel per method: where the tokens go on average."""
    figure, grid = plt.subplots(
        1, len(looks), figsize=(2.6 * len(looks) + 0.8, 2.9), squeeze=False, layout="constrained"
    )
    for axes, (name, look) in zip(grid[0], looks.items(), strict=True):
        fine = (~look.coarse).double().mean(0)
        shown = axes.imshow(fine.numpy() * 100, vmin=0, vmax=100, cmap="cividis")
        axes.set(xticks=[], yticks=[], title=name, xlabel=f"{100 * fine.mean():.0f} % fine")
    figure.colorbar(shown, ax=grid, label="pictures in which the region is fine (%)", shrink=0.9)
    return figure


def lost(dense: Look, gated: Look, classes: list[str], count: int = 12) -> Figure:
    """The first pictures that the dense model names and the gated one does not: picture, and what the latter saw."""
    wrong = (dense.correct & ~gated.correct).nonzero()[:, 0]
    shown, model, columns = wrong[:count].tolist(), gated.model, 6
    bands = math.ceil(len(shown) / columns)
    size = (1.5 * columns, max(3.6 * bands, 0.4))
    figure, grid = plt.subplots(2 * max(bands, 1), columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], visible=False)
    for number, i in enumerate(shown):
        image, coarse = dense.images[i], gated.coarse[i]
        seen = as_the_model_sees(image, coarse, model.scale)
        pair = grid[2 * (number // columns) : 2 * (number // columns) + 2, number % columns]
        for axes, pixels in zip(pair, (image, seen), strict=True):
            axes.set_visible(True)
            axes.imshow(to_pixels(pixels, dense.mean, dense.std), interpolation="nearest")
        draw_grid(pair[1], coarse, model.coarse_patch, model.scale)
        pair[0].set_xlabel(f"#{i}: {classes[dense.predicted[i]]}", fontsize=8)
        pair[1].set_xlabel(f"said: {classes[gated.predicted[i]]}", fontsize=8)
    back = int((gated.correct & ~dense.correct).sum())
    told = f"{len(wrong)} of {len(dense.correct)} pictures are lost, {back} won"
    figure.suptitle(told + (f"; the first {len(shown)} of the lost" if shown else ""), fontsize=9)
    return figure


def otherwise(look: Look, batch: int = 256) -> pd.DataFrame:
    """What a gated model makes of the same pictures with other decisions than its own, at the same rate and beyond."""
    own, gates = look.coarse.flatten(1), look.gates.flatten(1)
    count = round(own.sum(1).double().mean().item())
    anyhow = torch.rand(gates.shape, generator=torch.Generator().manual_seed(0))
    orders = {"as many in each picture, the gate's first": gates, "as many, any": anyhow, "as many, its last": -gates}
    none = torch.zeros_like(own)
    masks = {"as the gate decides": own}
    masks |= {name: none.scatter(1, scores.topk(count, 1).indices, True) for name, scores in orders.items()}
    masks |= {"all fine": none, "all coarse": ~none}
    rows = [{"decisions": name} | worth(look, m.view_as(look.coarse), batch)._asdict() for name, m in masks.items()]
    return pd.DataFrame(rows)
