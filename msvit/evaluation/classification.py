"""What a model does on a data set: accuracy, MACs with their spread, and where its fine regions lie."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gating.gate import Gate
from ..models.heads import Segmenter, load
from ..models.msvit import Result
from ..reducers.registry import reconstruction_errors
from ..training.build import Budget, choose_gate, first_pictures, load_data
from ..training.objectives import Gated, Objective, Objects
from ..training.recipe import RecipeError
from ..training.runs import RunError, read
from . import segmentation as segmetrics

COLUMNS = ("read", "correct", "loss", "macs", "tokens", "coarse", "object", "fine_object", "rest", "fine_rest")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    predict: segmetrics.Predict | None = None,
    accelerator=None,
) -> dict[str, float]:
    """Means over the pictures of a loader (`_sd`: their spread), each picture counted once by however many processes.

    Args:
        model: An MSViT; it is in the same mode afterwards.
        loader: Yields `msvit.data.loaders.Batch`; prepared by `accelerator` if there is one.
        predict: What to ask instead of `model.run`.
        accelerator: With several processes or autocast.

    Returns:
        accuracy, loss, macs (a share of the dense backbone's), tokens, coarse (a share of the regions) and pictures;
        for built-in scenes also fine_object and fine_rest, the shares of fine regions on the object and elsewhere.
        Files that could not be read are in none of these; `unreadable` counts them. For a segmenter it is what
        `msvit.evaluation.segmentation.evaluate` finds.
    """
    if isinstance(model, Segmenter):
        return segmetrics.evaluate(model, loader, predict, accelerator).numbers
    where_of, parts = object_finder(loader), []
    for (images, targets, indices), result in segmetrics.answers(model, loader, predict, accelerator):
        share = result.macs / model.dense_macs(images.shape[-2:])
        where = where_of(indices, model.coarse_patch) if where_of else None
        table = torch.stack(
            [column.to(torch.float64) for column in _columns(result, targets, indices, share, where)], 1
        )
        parts.append((accelerator.gather_for_metrics(table) if accelerator else table).cpu())
    if not parts:
        raise ValueError("the loader has no pictures to evaluate on")
    return _summary(dict(zip(COLUMNS, torch.cat(parts).T, strict=True)), where_of is not None)


def evaluate_run(
    folder: str | Path, macs: float | None = None, threshold: float | None = None, **changes: Any
) -> dict[str, float]:
    """`evaluate` for the model of a finished run.

    With a reducer, the reconstruction error of what it leaves is added for each of its layers, as a share of the
    tokens' variance, on the first pictures.

    Args:
        folder: The run's.
        macs: Set the threshold so that training pictures cost this share of dense MACs.
        threshold: Or set it outright.
        changes: Settings of the run's recipe to change first, as `data` or `gating`.
    """
    run = read(folder)
    if run.summary is None:
        raise RunError(f"{folder} is not finished and has no model yet; train on with the command that began it")
    recipe, model = run.recipe.replace(**changes), load(folder)
    loaders = load_data(recipe, model)
    own = len(model.classes) if isinstance(model, Segmenter) else model.vit.num_classes
    if len(loaders.classes) != own:
        raise RecipeError(f"data={recipe.data!r} has {len(loaders.classes)} classes, the run's model {own}")
    model.to("cuda" if torch.cuda.is_available() and recipe.device == "auto" else "cpu")
    if "gating" in changes:
        recipe = recipe.replace(epochs=max(recipe.epochs, 1))
        if recipe.gating == "learned" and type(model.gate) is not Gate:
            raise RecipeError(f"gating='learned': {folder} was trained with {run.recipe.gating!r} and has no gate")
        budget = choose_gate(model, recipe, loaders)
    else:
        budget = Budget(model, loaders.size, recipe)
    kind = Gated if recipe.epochs else Objective
    objective = kind(model, recipe, budget, {"val": object_finder(loaders.val)})
    if macs is not None:
        model.calibrate(first_pictures(loaders), macs)
    if threshold is not None:
        model.threshold = threshold
    found = evaluate(model, loaders.val, lambda images, indices: objective.predict(model, images, indices))
    found["threshold"] = model.threshold
    if model.reducer is not None:
        images = next(iter(loaders.val))[0].to(model.cut.device)
        errors = reconstruction_errors(model.reducer, model, images).nanmean(1).tolist()
        layers = zip(model.reducer.layers, errors, strict=True)
        found |= {f"reconstruction_error_{layer}": error for layer, error in layers}
    return found


def object_finder(loader: Iterable) -> Objects | None:
    """Where the objects are, if the pictures are built-in ones."""
    scenes = getattr(getattr(loader, "dataset", None), "scenes", None)
    if scenes is None:
        return None
    return lambda indices, patch: torch.from_numpy(scenes.object_regions(indices.cpu().numpy(), patch))


def _columns(result: Result, targets: Tensor, indices: Tensor, share: Tensor, where: Tensor | None) -> list[Tensor]:
    """The row of each picture in the table, `[B]` each, in the order of COLUMNS."""
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
