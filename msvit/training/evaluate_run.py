"""The evaluation of a finished run: of its own model, at other budgets, under other decisions, on other pictures."""

import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..checks import one_of
from ..data.aspect import whole_pictures
from ..data.loaders import Loaders
from ..evaluation.evaluate import evaluate
from ..evaluation.predictions import object_finder
from ..evaluation.reconstruction import reconstruction_errors
from ..gating.learned import kind_of
from ..models.coarse import name_of
from ..models.msvit import MSViT
from .budget import BUDGETED, Budget, choose_gate
from .build import load_data
from .files import RunWarning
from .objectives import Gated, Objective
from .recipe import Recipe, RecipeError
from .runs import load_model, read_finished


def evaluate_run(
    folder: str | Path,
    macs: float | None = None,
    threshold: float | None = None,
    aspect: str = "crop",
    **changes: Any,
) -> dict[str, float]:
    """Return `evaluate` for the model of a finished run.

    With a reducer, the reconstruction error of what it leaves is added for each of its layers, as a share of the
    tokens' variance, on the first pictures.

    Args:
        folder: The run's.
        macs: Set the threshold so that training pictures cost this share of dense MACs.
        threshold: Or set it outright.
        aspect: "crop" is what the run was evaluated on; "keep", whole pictures, each at its own aspect ratio and about
            as large, see `data.aspect`, packed into one call. A budget is met on what the run was trained on.
        changes: Settings of the run's recipe to change first, as `data` or `gating`.
    """
    run = read_finished(folder)
    recipe, model = run.recipe.replace(**changes), load_model(folder, fast_cpu=True)
    loaders = load_data(recipe.data, recipe.training.seed, model)
    if len(loaders.classes) != model.num_classes:
        raise RecipeError(
            f"data={recipe.data.source!r} has {len(loaders.classes)} classes, the run's model {model.num_classes}"
        )
    _compare_names(run.summary.get("classes") or [], loaders.classes)
    model.to("cuda" if torch.cuda.is_available() and recipe.training.device == "auto" else "cpu")
    if "gating" in changes:
        recipe = recipe.replace(epochs=max(recipe.training.epochs, 1))
        budget = _decide_otherwise(Path(folder), model, recipe, run.recipe, loaders)
    else:
        budget = Budget(model, loaders.size, recipe.gating if recipe.training.epochs else None, loaders)
    by = recipe.gating.by if recipe.training.epochs else "dense"
    if by not in BUDGETED and (macs is not None or threshold is not None):
        raise RecipeError(f"{folder} is evaluated as {by!r}, which has no budget; give gating too, such as entropy")
    kind = Gated if recipe.training.epochs else Objective
    objective = kind(model, recipe, budget, {"val": object_finder(loaders.val)})
    if macs is not None:
        budget.check("macs", macs)
    try:
        one_of("aspect", aspect, ("crop", "keep"))
        pictures = loaders.val if aspect == "crop" else whole_pictures(loaders)
        if aspect != "crop" and recipe.model.sliding:
            raise ValueError("aspect='keep' and windows of one size (sliding) exclude each other; use one of them")
        if macs is not None:
            model.calibrate(loaders.first_pictures(), macs)
        if threshold is not None:
            model.threshold = threshold
    except ValueError as error:
        raise RecipeError(str(error)) from error
    found = evaluate(model, pictures, partial(objective.predict, model))
    if broken := loaders.unreadable("val"):
        names = ", ".join(bad.name for bad in broken[:8])
        warnings.warn(f"{len(broken)} validation files cannot be read and are in no figure: {names}", RunWarning, 2)
    found["threshold"] = model.threshold
    if model.reducer is not None:
        errors = reconstruction_errors(model, next(iter(loaders.val))[0].to(model.cut.device)).nanmean(1).tolist()
        layers = zip(model.reducer.layers, errors, strict=True)
        found |= {f"reconstruction_error_{layer}": error for layer, error in layers}
    return found


def _compare_names(own: list[str], there: list[str]):
    """Warn where pictures have as many classes as the model's, and others."""
    if other := next((f"{name!r} is {was!r} there" for was, name in zip(own, there, strict=False) if was != name), ""):
        warnings.warn(f"the run's classes have other names ({other}); answers are compared by number", RunWarning, 3)


def _decide_otherwise(folder: Path, model: MSViT, recipe: Recipe, trained: Recipe, loaders: Loaders) -> Budget:
    """Let a run's model decide as another recipe says, as far as it has what that takes, and return the budget."""
    by = recipe.gating.by
    if recipe.gating.learned and type(model.gate) is not kind_of(by, len(model.scales) - 1):
        raise RecipeError(f"gating={by!r}: {folder} was trained with {trained.gating.by!r} and has no such gate")
    if by == "apt" and name_of(model.coarse_embed) != "apt":
        raise RecipeError(f"gating='apt': {folder} was trained without APT's path; its rule alone is 'entropy'")
    return choose_gate(model, recipe, loaders)
