"""From a recipe to its pictures and its model: a new backbone, a published one, or what another run has left."""

import os
import pickle
from pathlib import Path

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import eva, load_state_dict, vision_transformer
from torch import nn

from ..checks import closest, first_line
from ..core.backbone import check_backbone, convolution
from ..core.scales import checked_scales
from ..data.holdout import hold_out
from ..data.loaders import Loaders, make_loaders
from ..data.segmentation import make_seg_loaders
from ..gating.gate import make_gate, sizes_of
from ..gating.learned import Pattern, Quota, kind_of
from ..models.check_config import UNBUILT, ModelFolderError
from ..models.coarse import name_of
from ..models.heads import SegmentationHead
from ..models.hub import HUB, describe_backbone, read_args
from ..models.msvit import MSViT
from ..models.names import TIMM_MODULES
from ..models.shipped import load, shipped
from ..reducers.registry import make_reducer
from .recipe import DataSettings, ModelSettings, Recipe, RecipeError
from .runs import read

TINY = "vit_mini_patch8_64"


def build(recipe: Recipe, runs: Path) -> MSViT:
    """Return the model as it is before training, with the classes that it came with.

    Args:
        runs: The folder that "run:NAME" is looked for in.
    """
    settings, size, scales = recipe.model, recipe.data.size, scales_of(recipe)
    name, start, gate = {"tiny": TINY}.get(settings.name, settings.name), None, None
    if settings.pretrained and not (timm.models.is_model_pretrained(name) or name.startswith("hf-hub:")):
        raise RecipeError(f"model={settings.name!r} has no published weights; leave pretrained out")
    if timm.is_model(name) or name.startswith("hf-hub:"):
        vit = _create(settings, size, name, pretrained=settings.pretrained or name.startswith("hf-hub:"))
    else:
        start = _saved(name, runs)
        described, gate = describe_backbone(start.vit), start.gate if takes_over_gate(settings, runs) else None
        args = {k: v for k, v in read_args(described["args"]).items() if k not in ("img_size", "drop_path_rate")}
        vit = _create(settings, size, described["name"], **args)
        vit.load_state_dict(_fitted(start.vit.state_dict(), vit))
    try:
        check_backbone(vit)
        checked_scales(scales)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"model={settings.name!r}: {error}") from error
    if settings.checkpoint:
        _load_checkpoint(vit, Path(settings.checkpoint))
    gate = _choose_gate(recipe, vit, _saved(settings.gate, runs).gate if settings.gate else gate)
    try:
        reducer = make_reducer(recipe.reducer.name, vit, **recipe.reducer.settings) if recipe.reducer.name else None
        embed = "apt" if recipe.gating.by == "apt" else settings.coarse_embed
        model = MSViT(vit, settings.scale, gate, recipe.gating.margin, reducer, embed, fast_cpu=True, scales=scales)
        if start is not None and name_of(start.coarse_embed) == embed != "shared":
            model.coarse_embed.load_state_dict(start.coarse_embed.state_dict())
        if recipe.data.task == "segment" and start is not None and start.head.dense:
            model.set_head(SegmentationHead(vit, **start.head.settings))
            model.head.load_state_dict(start.head.state_dict())
        return model
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error


def scales_of(recipe: Recipe) -> tuple[int, ...]:
    """Return the sides of tokens in fine patches: given, or 1, the scale and what a rule's thresholds go on to."""
    thresholds = recipe.gating.rule_settings.get("thresholds")
    sizes = len(thresholds) if isinstance(thresholds, list) and thresholds else 1
    return tuple(recipe.model.scales) or (1, *(recipe.model.scale * 2**i for i in range(sizes)))


def takes_over_gate(settings: ModelSettings, runs: Path) -> bool:
    """Return whether the gate that a model begins with has been trained, by a run before this one."""
    if settings.gate or settings.name in shipped():
        return True
    path = path_of(settings.name, runs)
    if path.name == "dense" and os.path.isfile(path.parent / "settings.json"):
        return False  # stage one of a run
    if os.path.isfile(path / "settings.json"):
        recipe = read(path).recipe
        return bool(recipe.training.epochs and recipe.gating.learned)
    return os.path.isdir(path) or settings.name.startswith(HUB)


def _choose_gate(recipe: Recipe, vit: nn.Module, found: nn.Module | None) -> nn.Module:
    """Return the gate that was found, if it is of the kind that the recipe trains, or a new one."""
    segments = recipe.data.task == "segment"
    scales = scales_of(recipe)
    kind = kind_of(recipe.gating.by, len(scales) - 1) or kind_of("learned", len(scales) - 1)
    patch = scales[1] * vit.patch_embed.patch_size[0]
    grid = (recipe.data.size // patch,) * 2
    fits = type(found) is kind and sizes_of(found) == len(scales) - 1 and getattr(found, "grid", grid) == grid
    if fits and (recipe.model.gate or found.patch == patch):
        if kind is Quota:
            found.supervised = segments
        return found
    if recipe.model.gate and recipe.gating.learned:
        raise RecipeError(
            f"gate={recipe.model.gate!r} has {type(found).__name__}({found.extra_repr()}), but "
            f"gating={recipe.gating.by!r} trains a {kind.__name__} for {grid[0]} x {grid[1]} regions"
            + (f" and scales={list(scales)}" if len(scales) > 2 else "")
        )
    if kind is Pattern:
        return Pattern(grid, patch)
    channels, network = convolution(vit).in_channels, recipe.gating.network
    if kind is Quota:
        return Quota(patch, channels, supervised=segments, network=network)
    return make_gate(patch // scales[1], scales, channels, network)


def fit_head(model: MSViT, classes: list[str], task: str, settings: ModelSettings):
    """Give the model a new classifier or decoder, unless it has one for these classes already."""
    if task == "classify":
        if model.vit.num_classes != len(classes):
            model.vit.reset_classifier(len(classes))
        return
    model.vit.reset_classifier(0)
    if model.vit.attn_pool is not None:
        model.vit.attn_pool.requires_grad_(False)  # like the classifier, it has nothing to do
    wanted = {"classes": classes, "decoder": settings.decoder, "scatter": settings.scatter}
    try:
        if not model.head.dense or not wanted.items() <= model.head.settings.items():
            model.set_head(SegmentationHead(model.vit, **wanted))
    except ValueError as error:
        raise RecipeError(str(error)) from error


def load_data(settings: DataSettings, seed: int, model: MSViT, device: torch.device | None = None) -> Loaders:
    """Return the pictures, normalised as the backbone wants them; on the device if `make_loaders` can keep them."""
    options = {name: getattr(settings, name) for name in ("size", "batch", "train_n", "val_n", "workers", "augment")}
    config = model.vit.pretrained_cfg or {}
    options |= {"mean": config.get("mean", IMAGENET_DEFAULT_MEAN), "std": config.get("std", IMAGENET_DEFAULT_STD)}
    make = make_loaders
    if settings.task == "segment":
        make, options["short"] = make_seg_loaders, settings.short
    elif not settings.holdout:
        options["device"] = device
    try:
        loaders = make(settings.source, val_batch=2 * settings.batch, seed=seed, **options)
        return hold_out(loaders, settings.holdout, seed, settings.workers) if settings.holdout else loaders
    except (ValueError, OSError, ImportError) as error:
        raise RecipeError(str(error)) from error


def _create(settings: ModelSettings, size: int, name: str, pretrained: bool = False, **args) -> nn.Module:
    """Return a timm model for pictures of this size."""
    try:
        return timm.create_model(name, pretrained=pretrained, img_size=size, drop_path_rate=settings.drop_path, **args)
    except OSError as error:
        raise RecipeError(
            f"the published weights of model={name!r} cannot be had ({first_line(error)}); is there a network? Without "
            "one give a file of them by checkpoint, or leave pretrained out"
        ) from error
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise RecipeError(
            f"model={name!r} cannot be built for pictures of {size} px ({first_line(error)}); use a plain vision "
            "transformer (vit_*, deit_*, deit3_*, eva02_*) and a size that is a multiple of its coarse patch"
        ) from error


def path_of(name: str, runs: Path) -> Path:
    """Return the folder of a model that a run ("run:NAME") or `save_pretrained` has left."""
    return runs / name.removeprefix("run:") if name.startswith("run:") else Path(name)


def _saved(name: str, runs: Path) -> MSViT:
    """Return a model that is shipped, of a run beside this one ("run:NAME"), of a folder, or of the hub."""
    if name in shipped():
        return load(name)
    path = path_of(name, runs)
    if not name.startswith(HUB) and not os.path.isdir(path):
        near = closest(name, ["tiny", *shipped(), *timm.list_models(module=TIMM_MODULES)], 3)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models('*vit*')"
        raise RecipeError(f"{name!r} is no model of timm, no folder and no hub id ({HUB}OWNER/NAME); {hint}")
    try:
        return MSViT.from_pretrained(name if name.startswith(HUB) else path)
    except (OSError, ModelFolderError) as error:
        raise RecipeError(
            f"{name!r} gives no model ({first_line(error)}); a run's folder has one when the run is finished, "
            "its dense/ after stage one"
        ) from error


def _fitted(state: dict, vit: nn.Module) -> dict:
    """Return weights under timm's names, positions resized to the backbone's grid."""
    module = eva if isinstance(vit, eva.Eva) else vision_transformer
    return module.checkpoint_filter_fn(state, vit)


def _load_checkpoint(vit: nn.Module, path: Path):
    """Load weights from a file; its head is left out if it has other classes. Runs no pickled code."""
    if not os.path.isfile(path):
        raise RecipeError(f"checkpoint={str(path)!r}: there is no such file")
    own = vit.state_dict()
    try:
        state = _fitted(load_state_dict(str(path), weights_only=True), vit)
        shapes = {name: tuple(weight.shape) for name, weight in state.items()}
    except (*UNBUILT, EOFError, pickle.UnpicklingError) as error:
        raise RecipeError(
            f"checkpoint={str(path)!r} is neither safetensors nor a file of weights alone, and is refused: "
            f"{first_line(error)}"
        ) from error
    fits = {name: weight for name, weight in state.items() if name in own and shapes[name] == tuple(own[name].shape)}
    if lost := [name for name in own | state if name not in fits and not name.startswith("head")]:
        raise RecipeError(f"checkpoint={str(path)!r} is of another model: {', '.join(lost[:4])} … do not fit")
    vit.load_state_dict(fits, strict=False)
