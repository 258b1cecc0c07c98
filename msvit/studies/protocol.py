"""Results on real pictures: the rows of the protocol, where gates are fine, and what they get wrong.

Every row but the dense model starts from the seed's dense model and is trained on for as many epochs as the others.
`reports/real/protocol.md` says what is run, and why.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure

from .. import plots
from ..training import runs
from ..training.build import build
from ..training.recipe import Recipe
from .inspect import Inspection, accuracy_and_macs
from .methods import method_rows
from .study import FULL, StudyRow, check_two_scales, run_rows

TRAINED_ON, COARSE, SMALLER = "dense, trained on", "dense, all coarse", "dense, smaller pictures"
BASELINES = (SMALLER, "random mask", COARSE)


class Effort(NamedTuple):
    """How much of the protocol is carried out.

    Attributes:
        methods: Of COMPARED_METHODS.
        budgets: Shares of the dense model's MACs, at each of which every method has a row.
        sides: Of smaller pictures for the dense model, as shares of the full one's.
        seeds: Runs per row.
        epochs_dense, epochs: Of the dense model, and of each row.
        train_n: Training pictures in an epoch; 0 = all there are.
    """

    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    sides: tuple[float, ...]
    seeds: int
    epochs_dense: int
    epochs: int
    train_n: int = 0


OURS: dict[str, dict[str, Any]] = {
    FULL: {},
    f"{FULL}, l0": {"loss": "l0"},
    f"{FULL}, controller only": {"loss": "none", "control": "projection"},
}
OTHERS = ("random", "centre", "entropy", "apt", "dynamicvit", "evit", "tome", "token_pooling", "pitome", "diffrate")
COMPARED_METHODS = (*OURS, *OTHERS, "gate+tome")
SIDES = (0.5, 0.625, 0.75, 0.875)
EFFORTS = {
    "smoke": Effort((FULL, f"{FULL}, l0", "random", "dynamicvit", "tome"), (0.6,), (0.75,), 1, 2, 1, 8192),
    "cores": Effort(COMPARED_METHODS, (0.4, 0.5, 0.6, 0.75), SIDES, 3, 10, 1),
    "accelerator": Effort(COMPARED_METHODS, (0.4, 0.5, 0.6, 0.75), SIDES, 3, 100, 10),
}


def rows(base: Recipe, effort: Effort, lr: float) -> list[StudyRow]:
    """Return the rows of the protocol, all with this learning rate; at several budgets a method has several."""
    found = [StudyRow(TRAINED_ON, {"gating": "fine"}), StudyRow(COARSE, {"gating": "coarse"})]
    for side in smaller(base, effort.sides):
        found.append(StudyRow(f"{SMALLER} at {side} px", {"gating": "fine", "size": side}))
    for budget in effort.budgets:
        at = base.replace(target=budget)
        for name in effort.methods:
            own = [StudyRow(name, OURS[name])] if name in OURS else method_rows([name], at)
            found += [StudyRow(f"{r.label} at {budget:g}", r.changes | {"target": budget}) for r in own]
    return [row._replace(changes=row.changes | {"lr": lr}) for row in found]


def smaller(base: Recipe, shares: Iterable[float]) -> list[int]:
    """Return the sides of pictures that are nearest to shares of the full one's, in whole coarse patches."""
    patch, full = build(base, Path()).coarse_patch, base.data.size
    sides = [max(round(share * full / patch), 1) * patch for share in shares]
    return [side for side in dict.fromkeys(sides) if side < full]


def run_protocol(base: Recipe, effort: Effort, lr: float, folder: Path, jobs: int = 1) -> pd.DataFrame:
    """Train what is not there yet; the MACs of all rows are shares of the dense model's at the full picture size.

    The table has a column `series`: what the rows of a method at several budgets, or on pictures of several sizes, are
    points of. The full size is one of the latter.
    """
    check_two_scales(base, "the protocol, which compares the gate's decisions with others at its rate,")
    table = run_rows(base, rows(base, effort, lr), range(effort.seeds), folder, jobs)
    dense = table.loc[table["method"] == "dense", "dense_macs"].iloc[0]
    for column in ("macs", "macs_sd"):
        table[column] *= table["dense_macs"] / dense
    series = table["method"].str.replace(r" at \S+( px)?$", "", regex=True)
    return table.assign(series=series.replace({TRAINED_ON: SMALLER}))


def gated_rows(folder: Path, rows: pd.DataFrame, budget: float) -> pd.DataFrame:
    """Return the rows in which a learned gate decides alone, without a reducer, at one of the protocol's budgets."""
    rows = rows[rows["method"].str.endswith(f" at {budget:g}")]
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


def by_class(inspections: Mapping[str, Inspection]) -> pd.DataFrame:
    """Return the share of pictures that each model has right of each class, in per cent, and of all of them."""
    columns = {}
    for name, seen in inspections.items():
        named = pd.Series(seen.correct.double().numpy() * 100, index=[seen.classes[k] for k in seen.targets.tolist()])
        columns[name] = pd.concat([named.groupby(level=0).mean(), pd.Series({"all": named.mean()})])
    return pd.DataFrame(columns).rename_axis("class").round(1)
