"""A gate for a model as it is: no weight of the backbone changes, and no label is needed (`msvit fit-gate`)."""

import os
from pathlib import Path

import pandas as pd
import torch

from ..checks import in_interval
from ..core.backbone import convolution
from ..data.loaders import Loaders
from ..gating.gate import make_gate
from ..models.msvit import MSViT
from .budget import Budget, choose_gate
from .build import build, load_data
from .files import RunError, write_csv
from .recipe import Recipe, RecipeError
from .teach_gate import divergence, teach_gate

COMPARED_RULES = ("random", "entropy")  # what a gate has to beat at the same MACs


def fit_gate(
    recipe: Recipe, folder: str | Path, by: str = "utility", steps: int = 300, progress: bool = True
) -> pd.DataFrame:
    """Teach a new gate for the recipe's model, save both in a folder, and compare it with rules at the same MACs.

    Of the recipe, its data, model, gate_network, target, seed and device are used.

    Args:
        by: The teacher, see `msvit.training.teach_gate`.
        steps: Batches that the teacher "utility" takes.

    Returns:
        A row for each way to decide: `accuracy` (where the pictures' classes are as many as the model's), `agreement`
        with the answer that all fine tokens give, `divergence` from it, and `macs` as a share of dense.
    """
    folder = Path(folder)
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise RunError(f"{folder} is not empty; name a new folder, or delete it to fit the gate again")
    in_interval("steps", steps, "[1, inf)", RecipeError)
    if recipe.gating.by != "learned" or recipe.data.task != "classify":
        raise RecipeError("fit-gate teaches the learned gate of a classifier; leave gating and task as they are")
    model = build(recipe, folder.parent)
    if not model.num_classes:
        raise RecipeError(
            f"model={recipe.model.name!r} gives no answer that coarse regions could change: it has no classes"
        )
    loaders = load_data(recipe.data, recipe.training.seed, model)
    model.to("cuda" if torch.cuda.is_available() and recipe.training.device == "auto" else "cpu").eval()
    torch.manual_seed(recipe.training.seed)
    patch, channels = model.coarse_patch // model.scale, convolution(model.vit).in_channels
    model.gate = make_gate(patch, model.scales, channels, recipe.gating.network).to(model.cut.device)
    budget = Budget(model, loaders.size, recipe.gating, loaders)
    folder.mkdir(parents=True, exist_ok=True)  # that nothing can be written there is known before anything is learned
    teach_gate(model, loaders, budget.rates, by, recipe.training.seed, steps, progress)
    model.calibrate(loaders.first_pictures(), budget.macs)
    model.save_pretrained(folder)
    table = pd.DataFrame([{"decisions": f"gate, taught by {by}"} | compare_with_dense(model, loaders)])
    for rule in COMPARED_RULES:
        choose_gate(model, recipe.replace(gating=rule), loaders)
        table.loc[len(table)] = {"decisions": rule} | compare_with_dense(model, loaders)
    write_csv(table, folder / "fit_gate.csv")
    return table


@torch.no_grad()
def compare_with_dense(model: MSViT, loaders: Loaders) -> dict[str, float]:
    """Return how a model's answers on validation pictures differ from those with all tokens fine, and their MACs."""
    labelled, seen = len(loaders.classes) == model.num_classes, []
    with model.evaluating():
        for images, targets, indices in loaders.val:
            images, read = images.to(model.cut.device), indices >= 0
            dense, result = model.run(images, model.all_fine(images.shape[-2:])).logits, model.run(images)
            answer = result.logits.argmax(1)
            found = [answer == dense.argmax(1), divergence(dense, result.logits), result.macs]
            found += [answer == targets.to(answer.device)] if labelled else []
            seen.append(torch.stack([column.double().cpu() for column in found])[:, read])
    means = dict(
        zip(("agreement", "divergence", "macs", "accuracy"), torch.cat(seen, 1).mean(1).tolist(), strict=False)
    )
    return means | {"macs": means["macs"] / model.dense_macs(loaders.size)}
