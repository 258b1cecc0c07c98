"""From a recipe to its pictures and its model: a new backbone, a published one, or what another run has left."""

import copy
import difflib
import itertools
import math
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_state_dict
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import nn
from torch.utils.data import Dataset, IterableDataset

from ..data.loaders import Loaders, make_loader, make_loaders, set_epoch
from ..data.seeds import permutation
from ..data.segmentation import make_seg_loaders
from ..gating.gate import Gate
from ..gating.rules import make_rule
from ..models.heads import Segmenter, load
from ..models.hub import describe_backbone
from ..models.msvit import MSViT
from ..reducers.registry import make_reducer
from .recipe import Recipe, RecipeError

TINY = "vit_mini_patch8_64"
BUDGETED = ("learned", "centre", "border", "random", "entropy")  # gatings that the target steers


def build(recipe: Recipe, runs: Path) -> MSViT:
    """The model as it is before training, with the classes that it came with.

    Args:
        runs: The folder that "run:NAME" is looked for in.
    """
    name, start, gate = {"tiny": TINY}.get(recipe.model, recipe.model), None, None
    if timm.is_model(name) or name.startswith("hf-hub:"):
        vit = _create(recipe, name, pretrained=recipe.pretrained or name.startswith("hf-hub:"))
    else:
        start = _saved(name, runs)
        vit, gate = _create(recipe, **_described(start.vit)), start.gate
        vit.load_state_dict(checkpoint_filter_fn(start.vit.state_dict(), vit))
    if recipe.checkpoint:
        _load_checkpoint(vit, Path(recipe.checkpoint))
    if recipe.gate:
        gate = _saved(recipe.gate, runs).gate
    elif type(gate) is not Gate or gate.patch != recipe.scale * vit.patch_embed.patch_size[0]:
        gate = None  # a rule, or one for another scale
    try:
        reducer = make_reducer(recipe.reducer, vit, **recipe.reducer_settings) if recipe.reducer else None
        model = MSViT(vit, recipe.scale, gate, recipe.margin, reducer, recipe.share_embedding)
        if recipe.task == "segment" and isinstance(start, Segmenter):
            model = Segmenter(model, **start.settings)
            model.decoder.load_state_dict(start.decoder.state_dict())
        return model
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error


def fit_head(model: MSViT, classes: list[str], recipe: Recipe) -> MSViT:
    """The model with a new head or decoder, unless it has one for these classes already."""
    if recipe.task == "classify":
        if model.vit.num_classes != len(classes):
            model.vit.reset_classifier(len(classes))
        return model
    model.vit.reset_classifier(0)
    if model.vit.attn_pool is not None:
        model.vit.attn_pool.requires_grad_(False)  # like the head, it has nothing to do
    wanted = {"classes": classes, "decoder": recipe.decoder, "scatter": recipe.scatter}
    try:
        return model if getattr(model, "settings", None) == wanted else Segmenter(model, **wanted)
    except ValueError as error:
        raise RecipeError(str(error)) from error


def load_data(recipe: Recipe, model: MSViT, device: torch.device | None = None) -> Loaders:
    """The recipe's pictures, normalised as the backbone wants them; on the device if `make_loaders` can keep them."""
    names = ("data", "size", "batch", "train_n", "val_n", "seed", "workers", "augment")
    config = model.vit.pretrained_cfg or {}
    mean, std = config.get("mean", IMAGENET_DEFAULT_MEAN), config.get("std", IMAGENET_DEFAULT_STD)
    settings = {name: getattr(recipe, name) for name in names}
    make = make_loaders
    if recipe.task == "segment":
        make, settings["short"] = make_seg_loaders, recipe.short
    elif not recipe.holdout:
        settings["device"] = device
    try:
        loaders = make(val_batch=2 * recipe.batch, mean=mean, std=std, **settings)
    except (ValueError, OSError) as error:
        raise RecipeError(str(error)) from error
    return _hold_out(loaders, recipe) if recipe.holdout else loaders


class Budget:
    """What the recipe's target means for a model.

    Attributes:
        grid: Coarse regions (h, w).
        dense: MACs of the backbone alone.
        shares: `[hw + 1]`, the share of dense MACs by the number of coarse regions, gate and reducer included.
        rate: The share of coarse regions that belongs to the target.
        macs: The share of dense MACs at that rate.
    """

    def __init__(self, model: MSViT, size: tuple[int, int], recipe: Recipe):
        if any(side % model.coarse_patch for side in size):
            raise RecipeError(
                f"size={recipe.size}: pictures must be a whole number of coarse patches of {model.coarse_patch} px; "
                f"use {max(recipe.size // model.coarse_patch, 1) * model.coarse_patch}"
            )
        h, w = self.grid = model.grid(size)
        self.dense, self.rate = model.dense_macs(size), recipe.target
        if not recipe.epochs or recipe.gating not in BUDGETED:
            return
        self.shares = model.macs_of(torch.arange(h * w + 1), size) / self.dense
        rates, shares = np.linspace(0, 1, h * w + 1), self.shares.numpy()
        if recipe.budget == "macs":
            if not shares[-1] < recipe.target < shares[0]:
                raise RecipeError(
                    f"target={recipe.target:g} cannot be met: this model's share of dense MACs is {shares[-1]:.3f} "
                    f"with all regions coarse and {shares[0]:.3f} with all fine; choose one between, or another scale"
                )
            self.rate = float(np.interp(recipe.target, shares[::-1], rates[::-1]))
        self.macs = float(np.interp(self.rate, rates, shares))


def choose_gate(model: MSViT, recipe: Recipe, loaders: Loaders) -> Budget:
    """Puts a rule in the gate's place if the recipe says so, and holds it to the budget as far as a rule can be."""
    if recipe.gating in ("learned", "oracle"):
        return Budget(model, loaders.size, recipe)
    device = model.cut.device
    model.gate = make_rule("fine")  # costs what every rule costs, nothing
    budget, settings = Budget(model, loaders.size, recipe), {}
    if recipe.gating in ("centre", "border", "random"):
        settings["rate"] = budget.rate
    if recipe.gating == "random":
        settings["seed"] = recipe.seed
    if recipe.gating == "entropy":
        settings = {"mean": loaders.mean, "std": loaders.std}
    model.gate = make_rule(recipe.gating, **settings).to(device)
    if recipe.gating == "entropy":
        model.calibrate(first_pictures(loaders), budget.macs)
    return budget


def first_pictures(loaders: Loaders, count: int = 2048) -> Iterator:
    """Some training pictures without augmentation, to calibrate on; unlike a prepared loader's, the same for all."""
    set_epoch(loaders.plain, 0)
    return itertools.islice(loaders.plain, math.ceil(count / loaders.plain.batch_size))


class Part(Dataset):
    """Some pictures of a data set, which keep their numbers and names. Keys are epoch * n + i, as from samplers."""

    def __init__(self, data: Dataset, indices: np.ndarray):
        self.data, self.indices, self.name, self.unreadable = data, indices, data.name, data.unreadable
        self.scenes = getattr(data, "scenes", None)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, keys: Sequence[int]) -> Any:
        epochs, i = np.divmod(np.asarray(keys), len(self))
        moved = (epochs * len(self.data) + self.indices[i]).tolist()
        every = getattr(self.data, "__getitems__", None)
        return every(moved) if every else [self.data[key] for key in moved]


def _hold_out(loaders: Loaders, recipe: Recipe) -> Loaders:
    """A part of the training pictures takes the place of the validation pictures."""
    data = loaders.train.dataset
    if isinstance(data, IterableDataset):
        raise RecipeError(f"holdout={recipe.holdout:g}: {recipe.data!r} is a stream, nothing of it can be held out")
    order = permutation(len(data), recipe.seed, 6)
    count = max(1, round(recipe.holdout * len(data)))
    plain = copy.copy(data)
    plain.transform = getattr(loaders.val.dataset, "transform", None)
    settings, collate = (recipe.seed, recipe.workers), loaders.train.collate_fn
    train = make_loader(Part(data, order[count:]), recipe.batch, *settings, shuffle=True, collate=collate)
    val = make_loader(Part(plain, order[:count]), 2 * recipe.batch, *settings, shuffle=False, collate=collate)
    rest = Part(loaders.plain.dataset, order[count:])
    steady = make_loader(rest, recipe.batch, *settings, shuffle=True, collate=collate)
    return replace(loaders, train=train, val=val, plain=steady, steps=len(train))


def _create(recipe: Recipe, name: str, pretrained: bool = False, **args) -> nn.Module:
    """A timm model for pictures of the recipe's size."""
    try:
        return timm.create_model(
            name, pretrained=pretrained, img_size=recipe.size, drop_path_rate=recipe.drop_path, **args
        )
    except (TypeError, AssertionError) as error:
        raise RecipeError(
            f"model={name!r} cannot be built for pictures of {recipe.size} px ({error}); use a plain vision "
            "transformer (vit_*, deit_*, deit3_*) and a size that is a multiple of its coarse patch"
        ) from error


def _saved(name: str, runs: Path) -> MSViT:
    """The model of a run beside this one ("run:NAME"), of a folder, or of a hub id."""
    path = runs / name.removeprefix("run:") if name.startswith("run:") else Path(name)
    if not path.is_dir() and (name.startswith(("run:", ".", "/")) or name.count("/") != 1):
        near = difflib.get_close_matches(name, ["tiny", *timm.list_models(module=["vision_transformer", "deit"])], 3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models('*vit*')"
        raise RecipeError(f"{name!r} is no model of timm, no folder and no hub id; {hint}")
    try:
        return load(str(path) if path.is_dir() else name)
    except (OSError, SafetensorError) as error:
        raise RecipeError(
            f"{name!r} gives no model ({str(error).splitlines()[0]}); a run's folder has one when the run is finished, "
            "its dense/ after stage one"
        ) from error


def _described(vit: nn.Module) -> dict[str, Any]:
    """Name and arguments of a built backbone, but for what the recipe says."""
    described = describe_backbone(vit)
    args = {k: v for k, v in described["args"].items() if k not in ("img_size", "drop_path_rate")}
    return {"name": described["name"], **args}


def _load_checkpoint(vit: nn.Module, path: Path):
    """Weights from a file; its head is left out if it has other classes. Runs no pickled code."""
    try:
        state = checkpoint_filter_fn(load_state_dict(str(path), weights_only=True), vit)
    except FileNotFoundError:
        raise RecipeError(f"checkpoint={str(path)!r}: there is no such file") from None
    except (pickle.UnpicklingError, RuntimeError, SafetensorError) as error:
        raise RecipeError(
            f"checkpoint={str(path)!r} is neither safetensors nor a file of weights alone, and is refused: "
            f"{str(error).splitlines()[0]}"
        ) from error
    own = vit.state_dict()
    state = {k: v for k, v in state.items() if not k.startswith("head") or getattr(own.get(k), "shape", 0) == v.shape}
    missing, unknown = vit.load_state_dict(state, strict=False)
    if lost := [k for k in missing if not k.startswith("head")] + unknown:
        raise RecipeError(f"checkpoint={str(path)!r} is of another model: {', '.join(lost[:4])} … do not fit")
