"""All that can be known of a run before its first step, in one place. Nothing is written.

Hours of dense training must not end in a word about the gate: so each stage is rehearsed, with a copy of the model, on
two random pictures of the run's size.
"""

import copy
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from timm.data import Mixup
from timm.optim import list_optimizers

from ..checks import first_line, one_of
from ..data.images import seeded
from ..data.loaders import Loaders
from ..evaluation.predictions import Objects, object_finder
from ..models.msvit import MSViT
from .budget import Budget, choose_gate
from .build import build, fit_head, load_data
from .objectives import Gated, Objective
from .recipe import Recipe, RecipeError
from .runs import RunFolder
from .stage import make_descent

# What a rehearsal raises where settings do not go together.
REFUSALS = (ValueError, TypeError, AssertionError, RuntimeError, LookupError, ArithmeticError)


class RunParts(NamedTuple):
    """What a run is made of; `objects` has by split where the objects are, None where nobody knows."""

    model: MSViT
    loaders: Loaders
    budget: Budget
    objects: dict[str, Objects | None]
    mixup: Mixup | None


def prepare(recipe: Recipe, runs: Path, device: torch.device | None = None, processes: int = 1) -> RunParts:
    """Return what a run of a recipe is made of, or raise a `RecipeError` if it could not be carried out.

    Args:
        runs: The folder that "run:NAME" is looked for in.
        device: Where it will train; None is the CPU.
        processes: Among which its batches are split.
    """
    training = recipe.training
    _refuse_unused(recipe)
    one_of("optimizer", training.optimizer.lower().removeprefix("lookahead_"), list_optimizers(), RecipeError)
    torch.manual_seed(training.seed)
    model = build(recipe, runs)
    loaders = load_data(recipe.data, training.seed, model, device)
    for name, loader in (("batch", loaders.train), ("val_n", loaders.val)):
        if loader.batch_size % processes:
            raise RecipeError(
                f"{name}: a batch of {loader.batch_size} pictures cannot be split over {processes} processes; "
                "choose a multiple"
            )
    objects = {name: object_finder(getattr(loaders, name)) for name in ("train", "val")}
    if training.epochs and recipe.gating.by == "oracle" and objects["train"] is None:
        raise RecipeError(f"gating='oracle' knows where the objects are in scenes alone, not in {recipe.data.source!r}")
    fit_head(model, loaders.classes, recipe.data.task, recipe.model)
    budget = choose_gate(model, recipe, loaders)
    parts = RunParts(model.to(device or "cpu"), loaders, budget, objects, _make_mixup(recipe, loaders, processes))
    try:
        with seeded(training.seed):
            _rehearse(parts, recipe, loaders.train.batch_size // processes)
    except RecipeError:
        raise
    except REFUSALS as error:
        raise RecipeError(f"this cannot be trained: {first_line(error)}") from error
    return parts


def prepare_all(plan: Iterable[Recipe], runs: Path):
    """Prepare all runs of a plan that are not finished: the last one's mistake is known before the first one trains.

    A run that starts from another of the plan is prepared from what that one starts from.
    """
    planned = {f"run:{recipe.run_name}": recipe for recipe in plan}
    for recipe in planned.values():
        if not RunFolder(runs / recipe.run_name).check(recipe):
            prepare(_ahead(recipe, planned, runs), runs)


def _ahead(recipe: Recipe, planned: dict[str, Recipe], runs: Path) -> Recipe:
    """Return the recipe with what is already there in place of runs that are still to come."""

    def to_come(name: str) -> Recipe | None:
        name = name.removesuffix("/dense")
        there = (runs / name.removeprefix("run:") / "summary.json").exists()
        return None if there else planned.get(name)

    while before := to_come(recipe.model.name):
        recipe = recipe.replace(model=before.model.name)
    if to_come(recipe.model.gate):
        recipe = recipe.replace(gate="", gate_lr=recipe.training.gate_lr or 1e-3)
    return recipe.replace(calibrate=False)  # which reads pictures, and changes no shape


def _refuse_unused(recipe: Recipe):
    """Raise for what would be accepted and ignored; not in the recipe, since runs of earlier versions may have it."""
    if recipe.model.gate and recipe.training.epochs and not recipe.gating.learned:
        raise RecipeError(f"gate={recipe.model.gate!r} is a trained gate, and gating={recipe.gating.by!r} has none")
    if recipe.gating.control != "none" and recipe.held_fixed:
        raise RecipeError(f"control={recipe.gating.control!r} moves the gate, and gate_lr=0 holds it; leave one out")
    if recipe.gating.control != "none" and recipe.training.epochs and not recipe.gating.shaped:
        raise RecipeError(
            f"control={recipe.gating.control!r} holds a learned gate at its budget; gating={recipe.gating.by!r} keeps "
            "to its own, so leave control out"
        )
    if recipe.reducer.settings and not recipe.reducer.name:
        raise RecipeError(f"reducer_settings={recipe.reducer.settings} are of no reducer; name one by reducer=…")
    scale, scales = recipe.model.scale, recipe.model.scales
    if scales and scale not in (2, scales[1] if len(scales) > 1 else 2):
        raise RecipeError(f"scale={scale} and scales={scales} contradict each other; leave scale out")
    if recipe.training.epochs_dense and not recipe.training.lr:
        raise RecipeError("lr=0 leaves the dense stage nothing to train; raise it, or make epochs_dense 0")


def _make_mixup(recipe: Recipe, loaders: Loaders, processes: int) -> Mixup | None:
    settings, batch = recipe.training, loaders.train.batch_size // processes
    if not (settings.mixup or settings.cutmix):
        return None
    if batch % 2:
        raise RecipeError(f"mixup and cutmix take pairs of pictures, and {batch} are in a batch; make it even")
    labels = {"label_smoothing": settings.smoothing, "num_classes": len(loaders.classes)}
    return Mixup(settings.mixup, settings.cutmix, **labels)


def _rehearse(parts: RunParts, recipe: Recipe, batch: int):
    """Take a step of each stage with a copy of the model, and evaluate one picture."""
    training, steps = recipe.training, parts.loaders.steps
    height, width = parts.loaders.size
    device, count = parts.model.cut.device, min(batch, 2)
    for epochs, kind in ((training.epochs_dense, Objective), (training.epochs, Gated)):
        if not epochs:
            continue
        objective = kind(copy.deepcopy(parts.model), recipe, parts.budget, parts.objects).to(device)
        for gate in getattr(objective.model.gate, "levels", ()):
            gate.count_as_trained()  # or it would warn that it has learned nothing, before it could
        optimizer, _ = make_descent(objective, epochs, math.ceil(steps / training.accumulate))
        images, indices = torch.randn(count, 3, height, width, device=device), torch.arange(count)
        targets = (indices % len(parts.loaders.classes)).to(device)
        if recipe.data.task == "segment":
            targets = targets[:, None, None].expand(count, height, width)
        elif parts.mixup:
            images, targets = parts.mixup(images, targets)
        objective.train().begin(0.0)
        out = objective(images, targets, indices)
        if not math.isfinite(out.loss.item()):
            raise RecipeError(f"the loss of {count} random pictures is {out.loss.item()}; see the settings of the loss")
        out.loss.backward()
        optimizer.step()
        with torch.no_grad():
            objective.eval().predict(objective.model, images[:1], indices[:1])
