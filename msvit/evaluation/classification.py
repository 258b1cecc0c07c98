"""What a classifier does on a data set: accuracy, MACs with their spread, and where its fine regions lie."""

from collections.abc import Iterable

import torch.nn.functional as F

from ..data.loaders import Batch
from ..models.msvit import MSViT, Result
from .predictions import Columns, Predict, means, object_ratios, per_picture


def evaluate_classes(
    model: MSViT, loader: Iterable, predict: Predict | None = None, accelerator=None
) -> dict[str, float]:
    """Return means over the pictures of a loader (`_sd`: their spread); arguments as of `evaluate`.

    Returns:
        accuracy, loss, macs (a share of the dense backbone's), tokens, coarse (a share of the regions) and pictures; of
        a gate that learns also decided, the share of regions that it is sure of (m below 1/4 or above 3/4);
        for built-in scenes also fine_object and fine_rest, the shares of fine regions on the object and elsewhere.
        Files that could not be read are in none of these; `unreadable` counts them.
    """
    columns, pictures = per_picture(model, loader, _count, predict, accelerator)
    out = {"accuracy": columns["correct"].mean().item(), "loss": columns["loss"].mean().item()}
    names = [name for name in ("macs", "tokens", "coarse", "decided") if name in columns]
    return out | means(columns, names) | object_ratios(columns) | pictures


def _count(batch: Batch, result: Result) -> Columns:
    loss = F.cross_entropy(result.logits.float(), batch.targets, reduction="none")
    return {"correct": result.logits.argmax(1) == batch.targets, "loss": loss}
