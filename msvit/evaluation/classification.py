"""What a classifier does on a data set: accuracy, MACs with their spread, and where its fine regions lie."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.msvit import MSViT, Result
from .predictions import Predict, gathered, object_finder, predictions

PER_PICTURE = ("read", "correct", "loss", "macs", "tokens", "coarse", "object", "fine_object", "rest", "fine_rest")


@torch.no_grad()
def evaluate(model: MSViT, loader: Iterable, predict: Predict | None = None, accelerator=None) -> dict[str, float]:
    """Return means over the pictures of a loader (`_sd`: their spread); arguments as of `evaluation.evaluate`.

    Returns:
        accuracy, loss, macs (a share of the dense backbone's), tokens, coarse (a share of the regions) and pictures;
        for built-in scenes also fine_object and fine_rest, the shares of fine regions on the object and elsewhere.
        Files that could not be read are in none of these; `unreadable` counts them.
    """
    where_of, parts = object_finder(loader), []
    with model.evaluating():
        for (images, targets, indices), result in predictions(model, loader, predict, accelerator):
            share = result.macs / model.dense_macs(images.shape[-2:])
            where = where_of(indices, model.coarse_patch) if where_of else None
            columns = _columns(result, targets, indices, share, where)
            table = torch.stack([column.to(torch.float64) for column in columns], 1)
            parts.append((accelerator.gather_for_metrics(table) if accelerator else table).cpu())
    return _summary(dict(zip(PER_PICTURE, gathered(parts).T, strict=True)), where_of is not None)


def _columns(result: Result, targets: Tensor, indices: Tensor, share: Tensor, where: Tensor | None) -> list[Tensor]:
    """Return the row of each picture in the table, `[B]` each, in the order of PER_PICTURE."""
    fine = ~result.coarse
    where = torch.zeros_like(fine) if where is None else where.to(fine.device)
    loss = F.cross_entropy(result.logits.float(), targets, reduction="none")
    regions = [part.sum((1, 2)) for part in (where, where & fine, ~where, ~where & fine)]
    coarse = result.coarse.double().mean((1, 2))
    correct = result.logits.argmax(1) == targets
    return [indices.to(targets.device) >= 0, correct, loss, share, result.tokens, coarse, *regions]


def _summary(columns: dict[str, Tensor], objects: bool) -> dict[str, float]:
    read = columns["read"] > 0
    table = {name: column[read] for name, column in columns.items()}
    out = {"accuracy": table["correct"].mean().item(), "loss": table["loss"].mean().item()}
    for name in ("macs", "tokens", "coarse"):
        out[name] = table[name].mean().item()
        out[f"{name}_sd"] = table[name].std(correction=0).item()
    if objects:
        for name in ("object", "rest"):
            out[f"fine_{name}"] = (table[f"fine_{name}"].sum() / table[name].sum()).item()
    out["pictures"] = int(read.sum())
    if not read.all():
        out["unreadable"] = int((~read).sum())
    return out
