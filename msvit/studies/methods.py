"""The tables of the methods' papers: costs, fronts, ablations of losses and clustering, keep maps, picture sizes.

What is trained starts from the seed's dense model, as in every study; `notebooks/methods.ipynb` puts all in order.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from ..checks import one_of
from ..core.blocks import TokenStage
from ..core.macs import classifier_macs, embedding_macs, linear_macs, vit_macs
from ..evaluation.reconstruction import reconstruction_errors
from ..gating.rules import make_rule
from ..models.fit_reducer import fit_reducer
from ..models.msvit import MSViT
from ..progress import bar, visible
from ..reducers.registry import make_reducer
from ..training.build import build
from ..training.names import mask_label
from ..training.recipe import Recipe
from .inspect import Inspection, accuracy_and_macs, inspect_run
from .jobs import train_all
from .study import FULL, MASKS, REDUCER_METHODS, StudyRow, reducer_rows, run_rows

SECTIONS = ("cost", "smoothing", "reconstruction", "fronts", "losses", "dynamic", "sizes")
COMPARABLE = ("gate", *MASKS, *REDUCER_METHODS)

# What two papers vary in their methods: label -> settings. None of it changes what a picture costs.
DYNAMICVIT_LOSSES: dict[str, dict[str, Any]] = {
    "all losses": {},
    "without the prediction's KL": {"kl_weight": 0.0},
    "without the tokens' distance": {"token_weight": 0.0},
    "task and ratio alone": {"kl_weight": 0.0, "token_weight": 0.0},
}
CLUSTERINGS: dict[str, dict[str, Any]] = {
    "K-means, weighted": {"method": "kmeans", "weighted": True},
    "K-means": {"method": "kmeans", "weighted": False},
    "K-means, one assignment": {"method": "kmeans", "weighted": True, "iterations": 1},
    "K-medoids, weighted": {"method": "kmedoids", "weighted": True},
    "K-medoids": {"method": "kmedoids", "weighted": False},
}


def mac_shares(models: Iterable[str], sizes: Iterable[int]) -> pd.DataFrame:
    """Return the MACs of dense backbones and the shares of their parts, for each model and side of a picture.

    The columns after `macs` sum to 1: the linear layers of MLPs and of attention, attention's own products q k and A v,
    the patch embedding, and the classifier.
    """
    rows = []
    for name in models:
        for size in sizes:
            with torch.device("meta"):
                vit = build(Recipe(model=name, size=size), Path()).vit
            tokens = torch.tensor([vit.num_prefix_tokens + vit.patch_embed.num_patches])
            n, heads = int(tokens), sum(2 * block.attn.num_heads * block.attn.head_dim for block in vit.blocks)
            parts = {
                "MLP": n * sum(linear_macs(block.mlp) for block in vit.blocks),
                "attention's layers": n * sum(linear_macs(block.attn) for block in vit.blocks),
                "attention's products": n**2 * heads,
                "patch embedding": int(embedding_macs(vit, tokens)),
                "classifier": int(classifier_macs(vit, tokens)),
            }
            whole = int(vit_macs(vit, tokens))
            shares = {part: macs / whole for part, macs in parts.items()}
            rows.append({"model": name, "size": size, "macs": whole} | shares)
    return pd.DataFrame(rows)


def method_rows(names: Iterable[str], base: Recipe) -> list[StudyRow]:
    """Return a row for each of COMPARABLE: the gate, masks, reducers, and reducers after the gate, at one budget."""
    rows = []
    for name in names:
        one_of("method", name, COMPARABLE)
        if name in ("gate", *MASKS):
            rows.append(StudyRow(FULL, {}) if name == "gate" else StudyRow(mask_label(name), {"gating": name}))
        else:
            rows += reducer_rows([name], base)
    return rows


def variant_rows(name: str, variants: Mapping[str, Mapping[str, Any]], base: Recipe) -> list[StudyRow]:
    """Return a row for each variant of a reducer's settings, each fitted to the recipe's target."""
    vit = build(base, Path()).vit
    rows = []
    for label, settings in variants.items():
        fitted = fit_reducer(name, vit, base.gating.target, **settings)
        rows.append(StudyRow(label, {"gating": "fine", "reducer": name, "reducer_settings": fitted}))
    return rows


def loss_rows(base: Recipe) -> list[StudyRow]:
    """Return DynamicViT with and without its losses, and with all of them in one stage instead of three."""
    early = len(build(base, Path()).vit.blocks) // 4
    variants = DYNAMICVIT_LOSSES | {"all losses, one stage": {"layers": [early]}}
    return variant_rows("dynamicvit", variants, base)


def run_fronts(
    base: Recipe, models: Iterable[str], methods: Iterable[str], budgets: Iterable[float], seeds, folder: Path
) -> pd.DataFrame:
    """Train each method at each budget on each backbone; `series`, `point` and absolute `macs` for `plots.fronts`."""
    tables, methods, seeds = [], list(methods), list(seeds)
    for model in models:
        own, rows, names = base.replace(model=model), [], {"dense": ("dense", model)}
        for budget in budgets:
            for row in method_rows(methods, own.replace(target=budget)):
                label = f"{row.label} at {budget:g}"
                names[label] = (f"{row.label}, {model}", f"{budget:.0%}")
                rows.append(row._replace(label=label, changes=row.changes | {"target": budget}))
        table = run_rows(own, rows, seeds, folder)
        series, points = zip(*table["method"].map(names), strict=True)
        tables.append(table.assign(model=model, series=series, point=points))
    return _absolute(pd.concat(tables, ignore_index=True))


def run_sizes(
    base: Recipe, models: Iterable[str], sizes: Iterable[int], shrinks: Iterable[int], seeds, folder: Path
) -> pd.DataFrame:
    """Train dense models on small pictures, each as long as a method's two stages together; for `plots.fronts`.

    Args:
        sizes: Sides at which the pictures are loaded.
        shrinks: Whole numbers by which each of these is averaged down: the model sees every region coarse.
    """
    epochs, plan = base.training.epochs_dense + base.training.epochs, {}
    for model, size, shrink, seed in itertools.product(models, sizes, shrinks, seeds):
        recipe = base.replace(model=model, size=size, seed=seed, epochs_dense=epochs, epochs=0)
        if shrink > 1:
            recipe = recipe.replace(gating="coarse", scale=shrink, epochs_dense=0, epochs=epochs)
        plan[recipe.run_name] = (f"dense, {model}", recipe, f"{size / shrink:g} px")
    table = train_all([entry[:2] for entry in plan.values()], folder)
    return _absolute(table.assign(series=table["method"], point=[plan[run][2] for run in table["run"]]))


def _absolute(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with MACs of a picture in place of shares of the dense model's, which are kept as `share`."""
    return table.assign(share=table["macs"], macs=table["macs"] * table["dense_macs"])


def compare_reconstruction(inspection: Inspection, rows: Iterable[StudyRow]) -> pd.DataFrame:
    """Put reducers in a dense model as it is: the reconstruction error of each block, accuracy and MACs.

    Args:
        inspection: Of a dense model.
        rows: Of reducers; what they change in training does not matter.
    """
    found = []
    for row in bar(list(rows), "putting reducers in", unit="reducers", shown=visible()):
        dense, settings = inspection.model, row.changes["reducer_settings"]
        reducer = make_reducer(row.changes["reducer"], dense.vit, **settings)
        model = MSViT(dense.vit, dense.scale, make_rule("fine"), reducer=reducer, fast_cpu=True).eval()
        errors = torch.cat([reconstruction_errors(model, part) for part in inspection.images.split(64)], 1).mean(1)
        accuracy, macs = accuracy_and_macs(replace(inspection, model=model))
        for layer, error in zip(reducer.layers, errors.tolist(), strict=True):
            entry = {"method": row.label, "layer": layer, "error": error, "accuracy": accuracy, "macs": macs}
            found.append(entry)
    return pd.DataFrame(found)


def tokens_per_patch(where: Tensor) -> Tensor:
    """Return how many tokens each fine patch has, `[B, H_f, W_f]`, of `Tokens.where`: 1/n if n patches share one.

    A picture's sum is its number of patch tokens; a patch that was dropped has 0.
    """
    seen = where >= 0
    patches = where[seen].bincount(minlength=1)
    return seen / patches[where.clamp(min=0)].clamp(min=1)


def differs(stages: Iterable[TokenStage]) -> bool:
    """Return whether which patches have a token, or share one, depends on the picture, at any stage."""
    shares = [tokens_per_patch(stage.where) for stage in stages]
    return any(bool((share != share[:1]).any()) for share in shares)


def run_dynamic(base: Recipe, names: Iterable[str], seeds, folder: Path, pictures: int = 64) -> pd.DataFrame:
    """Train reducers at one budget, and a dense model as long; `static` says what was seen to treat all pictures alike.

    Of dense models, where there is nothing to see, `static` is False.
    """
    rows = [StudyRow("dense, trained on", {"gating": "fine"}), *reducer_rows(names, base)]
    table, static = run_rows(base, rows, seeds, folder), {}
    for row in table[table["method"].isin(names)].drop_duplicates("method").itertuples():
        seen = inspect_run(folder / row.run, pictures)
        with torch.no_grad():
            static[row.method] = not differs(seen.model.run(seen.images).stages)
    return table.assign(static=[static.get(method, False) for method in table["method"]])


def stages_of(inspection: Inspection) -> dict[str, Tensor]:
    """Return the tokens per patch after the tokenizer and after each stage of a model's reducer, for its pictures."""
    with torch.no_grad():
        stages = inspection.model.run(inspection.images).stages
    names = ["tokenizer" if stage.layer is None else f"block {stage.layer}" for stage in stages]
    return {name: tokens_per_patch(stage.where) for name, stage in zip(names, stages, strict=True)}
