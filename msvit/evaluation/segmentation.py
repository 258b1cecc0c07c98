"""How good a segmentation is, where it fails, and whether the fine regions lie where the detail is.

Everything is counted over a data set and divided at the end, picture by picture so that several processes can share
the work. Pixels labelled 255 are in no count.
"""

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import IGNORE
from ..data.loaders import Batch
from ..models.msvit import MSViT, Result
from .predictions import Columns, Predict, means, object_ratios, per_picture, ratios

BAND = 4  # pixels on both sides of an edge
RATIOS = {  # by name, counts of pixels (or sums over them) of which one is divided by the other
    "band_accuracy": ("band_right", "band"),
    "loss": ("loss", "known"),
    "fine": ("fine", "known"),
    "boundary_fine": ("boundary_fine", "boundary"),
}


class Quality(NamedTuple):
    """What an evaluation found: the numbers of a run's record, and a row for each class."""

    numbers: dict[str, Any]
    classes: pd.DataFrame


def confusion(prediction: Tensor, target: Tensor, classes: int) -> Tensor:
    """Count the pixels of each picture by true class (rows) and predicted class, int64 `[B, K, K]`."""
    b, known = len(target), target != IGNORE
    if (wrong := target[known & ((target < 0) | (target >= classes))]).numel():
        raise ValueError(
            f"label values {wrong.unique().tolist()[:8]}; expected 0..{classes - 1}, and {IGNORE} to ignore a pixel"
        )
    cell = (target.where(known, 0) * classes + prediction).flatten(1)
    cell = cell + torch.arange(b, device=cell.device)[:, None] * classes**2
    counts = torch.bincount(cell[known.flatten(1)], minlength=b * classes**2)
    return counts.view(b, classes, classes)


def class_table(matrix: Tensor, names: list[str]) -> pd.DataFrame:
    """Return a row for each class: IoU, recall (accuracy on its pixels), precision, and its share of the pixels.

    A class that is nowhere, in truth or prediction, has no IoU (NaN) and no part in the mean.
    """
    matrix = matrix.double().cpu()
    hit, true, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
    columns = {"iou": hit / (true + predicted - hit), "recall": hit / true, "precision": hit / predicted}
    columns["share"] = true / matrix.sum()
    return pd.DataFrame({"class": names} | {name: column.numpy() for name, column in columns.items()})


def near_edges(target: Tensor, radius: int = BAND) -> Tensor:
    """Return the pixels with one of another class at most `radius` away (Euclidean), bool `[B, H, W]`.

    With radius 1 these are the boundary pixels. Ignored pixels make no edges.
    """
    height, width = target.shape[1:]
    near = torch.zeros_like(target, dtype=torch.bool)
    for dy in range(min(radius, height - 1) + 1):
        for dx in range(-min(radius, width - 1), min(radius, width - 1) + 1):
            if dy**2 + dx**2 > radius**2 or (dy == 0 and dx <= 0):
                continue
            here = (slice(None), slice(0, height - dy), slice(max(0, -dx), width - max(0, dx)))
            there = (slice(None), slice(dy, height), slice(max(0, dx), width - max(0, -dx)))
            a, b = target[here], target[there]
            differ = (a != b) & (a != IGNORE) & (b != IGNORE)
            near[here] |= differ
            near[there] |= differ
    return near


def fine_pixels(coarse: Tensor, patch: int, size: tuple[int, int]) -> Tensor:
    """Return which pixels lie in fine regions, bool `[B, H, W]`; the padding of the picture is cut off."""
    fine = (~coarse).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return fine[:, : size[0], : size[1]]


def evaluate_pixels(model: MSViT, loader: Iterable, predict: Predict | None = None, accelerator=None) -> Quality:
    """Return what a model with a dense head does on a loader; arguments as of `evaluate`.

    Returns:
        miou, accuracy (of pixels), band_accuracy (of pixels within 4 px of an edge), loss, boundary_fine (the share of
        boundary pixels that lie in fine regions) to be held against fine (the share of all pixels that do), macs (a
        share of the all-fine model's), gmacs, tokens and coarse (a share of the regions), these four with their spread
        over pictures (`_sd`), iou (of each class; None if it is nowhere) and pictures; for built-in scenes also
        fine_object and fine_rest.
    """
    columns, pictures = per_picture(model, loader, partial(_count, model), predict, accelerator)
    names = model.head.classes
    matrix = columns["confusion"].sum(0)
    by_class = class_table(matrix, names)
    out = {"miou": float(by_class["iou"].mean()), "accuracy": (matrix.trace() / matrix.sum()).item()}
    out |= ratios(columns, RATIOS) | object_ratios(columns) | means(columns, ("macs", "gmacs", "tokens", "coarse"))
    ious = zip(names, by_class["iou"].tolist(), strict=True)
    out["iou"] = {name: None if math.isnan(iou) else iou for name, iou in ious}
    return Quality(out | pictures, by_class)


def _count(model: MSViT, batch: Batch, result: Result) -> Columns:
    """Return what is counted in each picture."""
    targets, prediction = batch.targets, result.logits.argmax(1)
    known = targets != IGNORE
    fine = fine_pixels(result.coarse, model.coarse_patch, targets.shape[1:]) & known
    band, boundary = near_edges(targets), near_edges(targets, 1)
    loss = F.cross_entropy(result.logits.float(), targets, ignore_index=IGNORE, reduction="none")
    pixels = {"known": known, "fine": fine, "band": band, "band_right": band & (prediction == targets)}
    pixels |= {"boundary": boundary, "boundary_fine": boundary & fine, "loss": loss}
    columns = {name: part.double().sum((1, 2)) for name, part in pixels.items()}
    return columns | {"gmacs": result.macs / 1e9, "confusion": confusion(prediction, targets, len(model.head.classes))}
