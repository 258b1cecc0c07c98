"""The study of the dense task: what mixed-scale tokens cost a segmentation, where, and whether gates find detail."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from .. import plots
from ..training.recipe import Recipe
from . import study
from .inspect import inspect_run

SEGMENTATION_COLUMNS = (
    *("miou", "accuracy", "band_accuracy", "macs", "gmacs", "gmacs_sd", "fine", "boundary_fine", "coarse"),
    "seconds",
)


def rows(base: Recipe, budgets: Iterable[float], others: Iterable[str] = ("random",)) -> list[study.StudyRow]:
    """Return the rows: all fine and all coarse, and at each budget the gate and what is compared with it.

    Args:
        others: Masks, "quota", and reducers, which are fitted to the backbone's share of the budget.
    """
    made = [study.StudyRow("all fine", {"gating": "fine"}), study.StudyRow("all coarse", {"gating": "coarse"})]
    for budget in dict.fromkeys(budgets):
        made.append(study.StudyRow(at_budget("gate", budget), {"target": budget}))
        for name in others:
            reduced = name in study.REDUCER_METHODS
            own = study.reducer_rows([name], base.replace(target=budget))[0].changes if reduced else {"gating": name}
            made.append(study.StudyRow(at_budget(name, budget), {"target": budget} | own))
    return made


def at_budget(name: str, budget: float) -> str:
    """Return what a row is called; other budgets have other names."""
    return f"{name} at {100 * budget:.10g}%"


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Return means over seeds, and with several seeds the spread of the quality and of the cost."""
    spread = ("miou ±", "band_accuracy ±", "macs ±")
    summary = study.summarise(table, columns=SEGMENTATION_COLUMNS)
    return summary.filter(["seeds", *SEGMENTATION_COLUMNS, *spread])


def class_ious(table: pd.DataFrame) -> pd.DataFrame:
    """Return the IoU of each class (columns) by method (rows), mean over seeds."""
    by_class = pd.DataFrame(list(table["iou"]), index=table["method"]).astype(float)
    return by_class.groupby(level=0, sort=False).mean()


def draw_pictures(folder: str | Path, count: int = 6) -> Figure:
    """Draw the first validation pictures of a run: tokens, truth, prediction and error."""
    seen = inspect_run(folder, count)
    return plots.segmentation_maps(seen.images, seen.coarse, seen.tokens, seen.targets, seen.predicted, seen.drawing)
