"""What the explorer can show: models on disk, by name or made on the spot, and pictures that need no download."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageNetInfo

from .data import SCENES
from .model import MSViT
from .recipe import Recipe
from .runs import RunError, read_recipe
from .scenes import DIFFICULTIES, Scenes
from .uploads import FORMATS, PictureError, read_picture

DEMO = "demo"
# The smallest that names nearly all easy scenes; the controller brings it near to its budget at a threshold of 0.5.
DEMO_RECIPE = Recipe(train_n=4096, val_n=512, epochs_dense=2, epochs=4, lr=2e-3, calibrate=False)
# What comes of folders that are no model, or one of another version.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
SHIPPED = {  # photographs that come with packages which a workbench has anyway: package, path inside it
    "a temple": ("sklearn", "datasets/images/china.jpg"),
    "a flower": ("sklearn", "datasets/images/flower.jpg"),
    "Grace Hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
}
SCENES_SHOWN = 48


class ModelError(ValueError):
    """A model that is not there or cannot be built."""


class Shot(NamedTuple):
    """A picture of the size that a model takes, and the name of its class where that is known."""

    name: str
    image: Image.Image
    truth: str = ""


@dataclass(frozen=True)
class Subject:
    """A model under a name, with what it takes to feed it and to read its answer."""

    name: str
    model: MSViT
    classes: tuple[str, ...]
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD
    note: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its pictures: those of the backbone, cut to whole coarse patches."""
        patch = self.model.vit.patch_embed.patch_size[0] * self.model.scale
        height, width = (side // patch * patch for side in self.model.vit.patch_embed.img_size)
        return height, width

    @cached_property
    def dense_ms(self) -> float:
        """Milliseconds of the plain backbone on one picture."""
        pixels = torch.zeros(1, 3, *self.model.vit.patch_embed.img_size)
        with torch.inference_mode():
            self.model.vit(pixels)  # the first call is slower than all later ones
            return timed(lambda: self.model.vit(pixels)).ms

    def normalise(self, image: Image.Image) -> torch.Tensor:
        """`[1, 3, H, W]` as the backbone wants it."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        return (pixels - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)


class Timed(NamedTuple):
    """What a function returned, and the milliseconds it took."""

    result: Any
    ms: float


def timed(function: Callable[[], Any], patience: float = 40.0) -> Timed:
    """Calls a function, as often as fits so many milliseconds; the fastest call counts, since others are disturbed."""
    best, spent = float("inf"), 0.0
    while spent + min(best, spent) <= patience or spent == 0:
        start = perf_counter()
        result = function()
        ms = 1e3 * (perf_counter() - start)
        best, spent = min(best, ms), spent + ms
    return Timed(result, best)


# ---- models


def find_models(runs: str | Path) -> list[str]:
    """What `load_model` can load: the demo, the runs and checkpoints under a folder, a network of random weights."""
    found = [
        path.parent.relative_to(runs).as_posix()
        for path in Path(runs).rglob("config.json")
        if (path.parent / "model.safetensors").is_file()
    ]
    return [DEMO, *sorted(found), "deit_tiny_patch16_224"]


def load_model(name: str, runs: str | Path) -> Subject:
    """A subject from "demo", a folder under `runs`, any folder that `save_pretrained` wrote, or a timm name."""
    folder = train_demo() if name == DEMO else next((f for f in (Path(runs) / name, Path(name)) if f.is_dir()), None)
    if folder is None:
        if not timm.is_model(name):
            raise ModelError(f"{name!r} is neither {DEMO!r}, a folder in {runs}, a folder, nor a model of timm")
        try:
            torch.manual_seed(0)
            model = MSViT(timm.create_model(name)).eval()
        except (TypeError, ValueError) as error:
            raise ModelError(f"{name}: {error}") from error
        return describe(name, model, note="random weights: good for tokens, MACs and time only")
    try:
        return _subject_of(name, folder)
    except UNREADABLE as error:
        raise ModelError(f"{folder} holds no model that can be read ({error}); name another, or delete it") from error


def describe(name: str, model: MSViT, note: str = "") -> Subject:
    """A subject from a model alone: timm's normalisation, and ImageNet's classes where there are a thousand."""
    config, count = model.vit.pretrained_cfg or {}, model.vit.num_classes
    classes = [f"class {i}" for i in range(count)]
    if count == 1000:
        info = ImageNetInfo()
        classes = [info.index_to_description(i).partition(",")[0] for i in range(count)]
    mean, std = config.get("mean", IMAGENET_DEFAULT_MEAN), config.get("std", IMAGENET_DEFAULT_STD)
    return Subject(name, model, tuple(classes), tuple(mean), tuple(std), note)


def train_demo() -> Path:
    """The folder of a small gated model of the built-in scenes, in the user's cache; trained if it cannot be read."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "msvit" / DEMO_RECIPE.name
    try:
        MSViT.from_pretrained(folder)
    except UNREADABLE:
        from .train import train  # imports accelerate, which whoever only looks need not wait for

        shutil.rmtree(folder, ignore_errors=True)  # of another version, or torn
        train(DEMO_RECIPE, folder)
    return folder


def _subject_of(name: str, folder: Path) -> Subject:
    """The model of a folder, with the classes and the normalisation of the data that its run was trained on."""
    subject = describe(name, MSViT.from_pretrained(folder).eval())
    home = folder.parent if folder.name == "dense" else folder
    try:
        data = read_recipe(home).data
    except RunError:  # a checkpoint without a run
        return subject
    note = "the dense stage: its gate is untrained" if home != folder else ""
    if data in SCENES:
        classes, mean, std = DIFFICULTIES[data.partition(":")[2]].classes, Scenes.mean, Scenes.std
    else:
        classes, mean, std = _saved_classes(home, data), subject.mean, subject.std
    if len(classes) != subject.model.vit.num_classes:
        classes = subject.classes
    return Subject(name, subject.model, tuple(classes), mean, std, note)


def _saved_classes(home: Path, data: str) -> list[str]:
    """Class names of a run: from its summary, or from the folders that it was trained on."""
    summary = home / "summary.json"
    if summary.is_file() and (classes := json.loads(summary.read_text()).get("classes")):
        return list(classes)
    parts = [Path(data.partition(":")[2]) / split for split in ("train", "training")]
    part = next((p for p in parts if data.startswith("folder:") and p.is_dir()), None)
    return sorted(p.name for p in part.iterdir() if p.is_dir()) if part else []


# ---- pictures


class Source:
    """Pictures under names; `shot(name, size)` gives one as a model takes it."""

    def __init__(self, files: dict[str, Path | bytes]):
        self.files = files

    def names(self) -> list[str]:
        return list(self.files)

    def shot(self, name: str, size: tuple[int, int]) -> Shot:
        """The middle of the picture, as large as it goes, at this height and width."""
        file = self.files[name]
        if isinstance(file, Path):
            try:
                file = file.read_bytes()
            except OSError as error:
                raise PictureError(f"{name} cannot be read: {error.strerror}") from error
        return Shot(name, ImageOps.fit(read_picture(file, name), size[::-1], Image.Resampling.BICUBIC))


class SceneSource(Source):
    """Validation scenes of one difficulty, made at the size that is asked for: resized, they would lose the class."""

    def __init__(self, difficulty: str):
        self.difficulty = difficulty
        labels = Scenes(SCENES_SHOWN, difficulty=difficulty, split="val").labels(range(SCENES_SHOWN))
        classes = DIFFICULTIES[difficulty].classes
        super().__init__({f"#{i} {classes[label]}": b"" for i, label in enumerate(labels)})

    def shot(self, name: str, size: tuple[int, int]) -> Shot:
        i = self.names().index(name)
        scenes = Scenes(i + 1, size, difficulty=self.difficulty, split="val")
        pixels, label = scenes[i]
        image = Image.fromarray((pixels * 64 + 128).byte().permute(1, 2, 0).numpy())
        return Shot(f"{self.difficulty} scene #{i}", image, scenes.classes[label])


def sources() -> dict[str, Source]:
    """The pictures that are there without asking for any."""
    found = {f"scenes: {name}": SceneSource(name) for name in DIFFICULTIES}
    photographs = {}
    for title, (package, inside) in SHIPPED.items():
        spec = find_spec(package)  # finds the folder without importing the package
        path = Path(spec.submodule_search_locations[0]) / inside if spec else None
        if path and path.is_file():
            photographs[title] = path
    return found | ({"photographs": Source(photographs)} if photographs else {})


def folder_source(folder: str | Path) -> Source:
    """The pictures of a folder and of the folders in it."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise PictureError(f"there is no folder {root}; name one that holds {', '.join(FORMATS)} files")
    files = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.suffix.lower() in SUFFIXES}
    if not files:
        raise PictureError(f"{root} holds no picture; looked for {', '.join(SUFFIXES)}")
    return Source(files)
