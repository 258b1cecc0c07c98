"""Models that the explorer can show: on disk, by name or trained on first use. Their pictures are in `sources`."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo

from ..core import backbone
from ..core.attention import Layout
from ..core.fast_linear import fast_linear
from ..core.tokens import Tokens
from ..data.loaders import SCENES
from ..data.scenes import DIFFICULTIES, Scenes
from ..gating.rules import Rule
from ..models.msvit import MSViT
from ..training.files import RunError
from ..training.recipe import Recipe
from ..training.runs import read_recipe

DEMO = "demo"
# The smallest that names nearly all easy scenes; the controller brings it near to its budget at a threshold of 0.5.
DEMO_RECIPE = Recipe(train_n=4096, val_n=512, epochs_dense=2, epochs=4, lr=2e-3, calibrate=False)
# What loading a folder raises that holds no model, or one of another version.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)


class ModelError(ValueError):
    """A model that is not there or cannot be built."""


@dataclass(frozen=True)
class LoadedModel:
    """A model under a name, with its classes and the normalisation of its pictures."""

    name: str
    model: MSViT
    classes: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    note: str = ""

    def __post_init__(self):
        if getattr(self.model.gate, "scales", 2) > 2:
            raise ModelError(
                f"{self.name} has a rule of three scales, {self.model.gate}: the explorer shows and paints regions "
                "that are coarse or fine, no blocks of regions; choose a model with two scales"
            )

    @classmethod
    def of(cls, name: str, model: MSViT, note: str = "") -> "LoadedModel":
        """Return a model with timm's normalisation, and ImageNet's classes where there are a thousand.

        Without a note, a rule that replaces the gate is noted.
        """
        config, count = model.vit.pretrained_cfg or {}, model.num_classes
        classes = model.head.classes if model.head.dense else [f"class {i}" for i in range(count)]
        if count == 1000 and not model.head.dense:
            info = ImageNetInfo()
            classes = [info.index_to_description(i).partition(",")[0] for i in range(count)]
        mean, std = config.get("mean", IMAGENET_DEFAULT_MEAN), config.get("std", IMAGENET_DEFAULT_STD)
        if not note and isinstance(model.gate, Rule):
            note = f"no gate: the rule {model.gate} decides"
        return cls(name, model, tuple(classes), tuple(mean), tuple(std), note)

    @property
    def segments(self) -> bool:
        """Whether it gives a class to each pixel."""
        return self.model.head.dense

    @property
    def closed_form(self) -> bool:
        """Whether MACs follow from the number of coarse regions alone, which a reducer can prevent."""
        return self.model.reducer is None or not self.model.reducer.adaptive

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its pictures: those of the backbone, cut to whole coarse patches."""
        patch = self.model.coarse_patch
        height, width = (side // patch * patch for side in self.model.vit.patch_embed.img_size)
        return height, width

    @cached_property
    def dense_ms(self) -> float:
        """Milliseconds of the dense backbone on one picture, with the same linear layers as the model itself."""
        pixels = torch.zeros(1, 3, *self.model.vit.patch_embed.img_size)
        with torch.inference_mode(), fast_linear(self.model.fast_cpu):
            run_dense(self.model, pixels)  # the first call is slower than all later ones
            return fastest_call(lambda: run_dense(self.model, pixels)).ms

    def normalise(self, image: Image.Image) -> torch.Tensor:
        """Return `[1, 3, H, W]` as the backbone wants it."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        return (pixels - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)


class FastestCall(NamedTuple):
    """What a function returned, and the milliseconds of its fastest call."""

    result: Any
    ms: float


def fastest_call(function: Callable[[], Any], patience: float = 40.0) -> FastestCall:
    """Call a function, as often as fits so many milliseconds; the fastest call counts, since others are disturbed."""
    best, spent = float("inf"), 0.0
    while spent + min(best, spent) <= patience or spent == 0:
        start = perf_counter()
        result = function()
        ms = 1e3 * (perf_counter() - start)
        best, spent = min(best, ms), spent + ms
    return FastestCall(result, best)


def run_dense(model: MSViT, images: torch.Tensor) -> torch.Tensor:
    """Return the logits of timm's own backbone, without gate and reducer; a dense head reads its patch tokens."""
    vit = model.vit
    if not model.head.dense:
        return vit(images)
    x, size = vit.forward_features(images), images.shape[-2:]
    b, n, _ = x.shape
    rows, prefix = torch.arange(b * n, device=x.device).view(b, n), vit.num_prefix_tokens
    tokens = Tokens(
        x=x.flatten(0, 1),
        activity=None,
        area=(rows % n >= prefix).flatten().float(),
        where=rows[:, prefix:].unflatten(1, [side // backbone.patch_size(vit) for side in size]),
        layout=Layout([n] * b, x.device),
    )
    return model.head.logits(vit, tokens, torch.zeros(b, *model.grid(size), device=x.device), size)


def find_models(runs: str | Path) -> list[str]:
    """Return what `load_model` can load: the demo, runs and checkpoints under a folder, a network of random weights."""
    found = [
        path.parent.relative_to(runs).as_posix()
        for path in Path(runs).rglob("config.json")
        if (path.parent / "model.safetensors").is_file()
    ]
    return [DEMO, *sorted(found), "deit_tiny_patch16_224"]


def load_model(name: str, runs: str | Path) -> LoadedModel:
    """Load "demo", a folder under `runs`, any folder that `save_pretrained` wrote, or a timm name."""
    folder = train_demo() if name == DEMO else next((f for f in (Path(runs) / name, Path(name)) if f.is_dir()), None)
    if folder is None:
        if not timm.is_model(name):
            raise ModelError(f"{name!r} is neither {DEMO!r}, a folder in {runs}, a folder, nor a model of timm")
        try:
            torch.manual_seed(0)
            model = MSViT(timm.create_model(name), fast_cpu=True).eval()
        except (TypeError, ValueError) as error:
            raise ModelError(f"{name}: {error}") from error
        return LoadedModel.of(name, model, note="random weights: good for tokens, MACs and time only")
    try:
        return _load_folder(name, folder)
    except ModelError:
        raise
    except LOAD_ERRORS as error:
        raise ModelError(f"{folder} holds no model that can be read ({error}); name another, or delete it") from error


def train_demo() -> Path:
    """Return the folder of a small gated model of the scenes, in the user's cache; train it if it cannot be read."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "msvit" / DEMO_RECIPE.run_name
    try:
        MSViT.from_pretrained(folder)
    except LOAD_ERRORS:
        from ..training.loop import train

        shutil.rmtree(folder, ignore_errors=True)  # of another version, or torn
        train(DEMO_RECIPE, folder)
    return folder


def _load_folder(name: str, folder: Path) -> LoadedModel:
    """Load a folder's model, with the classes and the normalisation of the data that its run was trained on."""
    loaded = LoadedModel.of(name, MSViT.from_pretrained(folder, fast_cpu=True).eval())
    home = folder.parent if folder.name == "dense" else folder
    try:
        recipe = read_recipe(home)
    except RunError:  # a checkpoint without a run
        return loaded
    source = recipe.data.source
    if source in SCENES:
        loaded = replace(loaded, mean=Scenes.mean, std=Scenes.std)
    if not loaded.segments:
        own = DIFFICULTIES[source.partition(":")[2]].classes if source in SCENES else _saved_classes(home, source)
        if len(own) == len(loaded.classes):
            loaded = replace(loaded, classes=tuple(own))
    return replace(loaded, note=loaded.note or _untrained(recipe, dense=home != folder))


def _untrained(recipe: Recipe, dense: bool) -> str:
    """Return why the gate of a run's model has learned nothing; an empty text if it has."""
    if dense or not recipe.training.epochs:
        return "the dense stage: its gate is untrained"
    if recipe.gating.by == "oracle":
        return "trained with the oracle's masks, which know where the object is: the gate shown here is untrained"
    return ""


def _saved_classes(home: Path, data: str) -> list[str]:
    """Return the class names of a run: from its summary, or from the folders that it was trained on."""
    summary = home / "summary.json"
    if summary.is_file() and (classes := json.loads(summary.read_text()).get("classes")):
        return list(classes)
    parts = [Path(data.partition(":")[2]) / split for split in ("train", "training")]
    part = next((p for p in parts if data.startswith("folder:") and p.is_dir()), None)
    return sorted(p.name for p in part.iterdir() if p.is_dir()) if part else []
