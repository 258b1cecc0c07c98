"""Results on real pictures: the rows of the protocol, where gates are fine, and what they get wrong.

Every row but the dense model starts from the seed's dense model and is trained on for as many epochs as the others.
`reports/real/protocol.md` says what is run, and why.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from .. import plots
from ..core.macs import vit_macs
from ..training import runs
from ..training.build import build
from ..training.names import mask_label
from ..training.recipe import Recipe
from .inspect import Inspection, accuracy_and_macs
from .study import FULL, StudyRow, check_two_scales, reducer_rows, run_rows

REDUCED = ("dense, trained on", f"{FULL}, gbas", f"{FULL}, l0", "random mask", "dynamicvit", "tome")
BUDGETS = (0.5, 0.75)
COMPARED = ("dynamicvit", "token_pooling", "evit", "tome", "gate+dynamicvit", "gate+tome")


def rows(base: Recipe, full: bool, lr: float) -> list[StudyRow]:
    """Return the rows of the full protocol or of the reduced one, with the learning rate of the second stage."""
    size = smaller(base)
    found = [
        StudyRow("dense, trained on", {"gating": "fine"}),
        StudyRow("dense, all coarse", {"gating": "coarse"}),
        StudyRow(f"dense at {size} px", {"gating": "fine", "size": size}, dense=False),
        *(StudyRow(f"{FULL}, {loss}", {"loss": loss}) for loss in ("gbas", "bas", "l0", "ratio")),
        StudyRow(f"{FULL}, controller only", {"loss": "none", "control": "projection"}),
        StudyRow(f"{FULL}, gbas, untrimmed", {"trim": "none"}),
        *(StudyRow(f"{FULL}, gbas at {budget:g}", {"target": budget}) for budget in BUDGETS),
        *(StudyRow(mask_label(mask), {"gating": mask}) for mask in ("random", "centre", "entropy", "apt")),
        *reducer_rows(COMPARED, base),
    ]
    if not full:
        found = [row for row in found if row.label in REDUCED]
    return [row._replace(changes=row.changes | {"lr": lr}) if row.dense else row for row in found]


def smaller(base: Recipe) -> int:
    """Return the side of the pictures on which the dense model's MACs are nearest to the target."""
    model = build(base, Path())
    patch, vit = model.coarse_patch, model.vit
    sides = torch.arange(patch, base.data.size + 1, patch)
    tokens = vit.num_prefix_tokens + (sides // vit.patch_embed.patch_size[0]) ** 2
    shares = vit_macs(vit, tokens) / model.dense_macs((base.data.size, base.data.size))
    return int(sides[(shares - base.gating.target).abs().argmin()])


def run_protocol(
    base: Recipe, full: bool, lr: float, seeds: Iterable[int], folder: Path, jobs: int = 1
) -> pd.DataFrame:
    """Train what is not there yet; the MACs of all rows are shares of the dense model's at the full picture size."""
    check_two_scales(base, "the protocol, which compares the gate's decisions with others at its rate,")
    table = run_rows(base, rows(base, full, lr), seeds, folder, jobs)
    dense = table.loc[table["method"] == "dense", "dense_macs"].iloc[0]
    for column in ("macs", "macs_sd"):
        table[column] *= table["dense_macs"] / dense
    return table


def gated_rows(folder: Path, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows in which a learned gate decides alone, without a reducer."""
    recipes = [runs.read(folder / name).recipe for name in rows["run"]]
    return rows[[bool(r.training.epochs and r.gating.learned and not r.reducer.name) for r in recipes]]


def lost_pictures(dense: Inspection, other: Inspection, classes: list[str]) -> Figure:
    """Draw the first pictures that the dense model gets right and the other wrong: picture, and what that one sees."""
    wrong = (dense.correct & ~other.correct).nonzero()[:, 0]
    first = wrong[:12]
    captions = [
        (f"#{i}: {classes[dense.predicted[i]]}", f"predicted: {classes[other.predicted[i]]}") for i in first.tolist()
    ]
    figure = plots.picture_pairs(dense.images[first], other.coarse[first], captions, other.drawing)
    won = int((other.correct & ~dense.correct).sum())
    title = f"{len(wrong)} of {len(dense.correct)} pictures are lost, {won} won"
    figure.suptitle(title + (f"; the first {len(first)} of the lost" if len(first) else ""), fontsize=9)
    return figure


def compare_decisions(inspection: Inspection, batch: int = 256) -> pd.DataFrame:
    """Evaluate a gated model on the same pictures with other decisions than its own, at the same rate and beyond."""
    own, gates = inspection.coarse.flatten(1), inspection.gates.flatten(1)
    count = round(own.sum(1).double().mean().item())
    anyhow = torch.rand(gates.shape, generator=torch.Generator().manual_seed(0))
    orders = {"as many in each picture, the gate's first": gates, "as many, any": anyhow, "as many, its last": -gates}
    none = torch.zeros_like(own)
    masks = {name: none.scatter(1, scores.topk(count, 1).indices, True) for name, scores in orders.items()}
    masks = {"as the gate decides": own} | masks | {"all fine": none, "all coarse": ~none}
    found = [accuracy_and_macs(inspection, mask.view_as(inspection.coarse), batch) for mask in masks.values()]
    return pd.DataFrame(found).assign(decisions=list(masks))[["decisions", "accuracy", "macs"]]


def decisions_table(inspections: Mapping[str, Inspection]) -> pd.DataFrame:
    """Return `compare_decisions` of several methods side by side, in per cent: a row for each way to decide."""
    table = pd.concat([compare_decisions(seen).assign(method=name) for name, seen in inspections.items()])
    table = table.pivot_table(index="decisions", columns="method", values=["accuracy", "macs"], sort=False) * 100
    table.columns = [f"{name}: {value} (%)" for value, name in table.columns]
    return table.round(1)
