"""The study of the dense task: what mixed-scale tokens cost a segmentation, where, and whether gates find detail."""

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from .. import plots
from ..models.msvit import MSViT
from ..training import runs
from ..training.build import load_data
from .study import StudyRow

SEGMENTATION_COLUMNS = (
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


def rows(budgets: Iterable[float], masks: Iterable[str] = ("random",)) -> list[StudyRow]:
    """Return the rows: all fine and all coarse, and at each budget the gate and masks that are not learned."""
    made = [StudyRow("all fine", {"gating": "fine"}), StudyRow("all coarse", {"gating": "coarse"})]
    for budget in budgets:
        made.append(StudyRow(f"gate at {budget:.0%}", {"target": budget}))
        made += [StudyRow(f"{mask} at {budget:.0%}", {"target": budget, "gating": mask}) for mask in masks]
    return made


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Return means over seeds, and with several seeds the spread of the quality and of the cost."""
    columns = [name for name in SEGMENTATION_COLUMNS if name in table]
    grouped = table.groupby("method", sort=False)
    out = grouped[columns].mean()
    out.insert(0, "seeds", grouped.size())
    for name in ("miou", "band_accuracy", "macs"):
        out[f"{name} ±"] = grouped[name].std(ddof=1)
    return out.dropna(axis=1, how="all")


def class_ious(table: pd.DataFrame) -> pd.DataFrame:
    """Return the IoU of each class (columns) by method (rows), mean over seeds."""
    by_class = pd.DataFrame(list(table["iou"]), index=table["method"]).astype(float)
    return by_class.groupby(level=0, sort=False).mean()


@torch.no_grad()
def draw_pictures(folder: str | Path, count: int = 6) -> Figure:
    """Draw the first validation pictures of a run: tokens, truth, prediction and error."""
    recipe, model = runs.read(folder).recipe, MSViT.from_pretrained(folder, fast_cpu=True)
    loaders = load_data(recipe.data, recipe.training.seed, model)
    images, targets, _ = next(iter(loaders.val))
    images, targets = images[:count], targets[:count]
    result = model.run(images)
    return plots.segmentation_maps(
        images,
        result.coarse,
        result.tokens,
        targets,
        result.logits.argmax(1),
        classes=len(model.head.classes),
        patch=model.coarse_patch,
        scale=model.scale,
        mean=loaders.mean,
        std=loaders.std,
    )
