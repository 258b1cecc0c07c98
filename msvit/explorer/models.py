"""Models that the explorer can show: shipped ones, on disk, or by name. Their pictures are in `sources`."""

from dataclasses import dataclass, replace
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from timm.data import ImageNetInfo, resolve_model_data_config

from ..checks import plain
from ..core import backbone
from ..core.attention import Layout
from ..core.fast_linear import fast_linear
from ..core.tokens import Tokens
from ..data.loaders import BUILT_IN, make
from ..data.made import Made
from ..gating.base import Rule
from ..gating.learned import Quota
from ..models.msvit import MSViT
from ..models.shipped import card, load, shipped
from ..training.files import RunError, read_json
from ..training.names import short_name
from ..training.runs import read_recipe

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
    mean: tuple[float, ...]
    std: tuple[float, ...]
    note: str

    @classmethod
    def of(cls, name: str, model: MSViT, note: str = "") -> "LoadedModel":
        """Return a model with timm's normalisation, and ImageNet's classes where there are a thousand.

        Without a note, a rule that replaces the gate is noted.
        """
        describe = ImageNetInfo().index_to_description if model.num_classes == 1000 else "class {}".format
        described = [describe(i).partition(",")[0] for i in range(model.num_classes)]
        classes = tuple(model.head.classes if model.head.dense else described)
        if not note and isinstance(model.gate, Rule):
            note = f"no gate: the rule {model.gate} decides"
        elif not note and isinstance(model.gate, Quota):
            note = f"{model.gate.rate:.0%} of the regions of each picture are coarse: another threshold, another quota"
        config = resolve_model_data_config(model.vit)
        return cls(name, model, classes, config["mean"], config["std"], note)

    @property
    def segments(self) -> bool:
        """Whether it gives a class to each pixel."""
        return self.model.head.dense

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its pictures: those of the backbone, cut to whole coarse patches."""
        return tuple(side - side % self.model.coarse_patch for side in self.model.vit.patch_embed.img_size)

    @torch.inference_mode()
    def run_dense(self) -> torch.Tensor:
        """Run the dense backbone on a picture of its size, with the same linear layers as the model itself."""
        with fast_linear(self.model.fast_cpu):
            return run_dense(self.model, torch.zeros(1, 3, *self.model.vit.patch_embed.img_size))


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
    return model.head.logits(vit, tokens, size)


def find_models(runs: str | Path) -> list[str]:
    """Return what `load_model` can load: shipped models, those in a folder, and a network of random weights."""
    folders = [path.parent for path in Path(runs).rglob("config.json")]
    found = [f.relative_to(runs).as_posix() for f in folders if (f / "model.safetensors").is_file()]
    return [*shipped(), *sorted(found), "deit_tiny_patch16_224"]


def title_of(name: str, folder: Path) -> str:
    """Return what people read of a model: of a run its short name, of others the name that they go by."""
    home = folder.parent if folder.name == "dense" else folder
    try:
        return short_name(read_recipe(home)) + (" · dense stage" if home != folder else "")
    except RunError:
        return name


def suited_to(source: str) -> str:
    """Return the shipped model for the pictures of a source: that of the scenes, or of photographs if it is there."""
    return "photo" if not source.startswith(("scenes", "screens")) and "photo" in shipped() else "scenes"


def load_model(name: str, runs: str | Path) -> LoadedModel:
    """Load a shipped model, a folder under `runs`, any folder that `save_pretrained` wrote, or a timm name."""
    if not name:
        raise ModelError(f"model='' names nothing; there are {', '.join(find_models(runs))}")
    if name in shipped():
        about = card(name)
        loaded = LoadedModel.of(name, load(name, fast_cpu=True), note=about.title)
        return replace(loaded, classes=about.classes, mean=about.mean, std=about.std)
    folder = next((f for f in (Path(runs) / name, Path(name)) if f.is_dir()), None)
    if folder is None and not timm.is_model(name):
        known = ", ".join(shipped())
        raise ModelError(f"{name!r} is neither shipped ({known}), a folder in {runs}, a folder, nor a model of timm")
    try:
        if folder is not None:
            return _load_folder(name, folder)
        torch.manual_seed(0)
        model = MSViT(timm.create_model(name), fast_cpu=True).eval()
        model.gate.count_as_trained()
        return LoadedModel.of(name, model, note="random weights: good for tokens, MACs and time only")
    except ModelError:
        raise
    except LOAD_ERRORS as error:
        why = f"{folder} holds no model that can be read ({error}); name another, or delete it"
        raise ModelError(why if folder else f"{name}: {error}") from error


def _load_folder(name: str, folder: Path) -> LoadedModel:
    """Load a folder's model, with the classes and the normalisation of the data that its run was trained on."""
    home = folder.parent if folder.name == "dense" else folder
    try:
        recipe = read_recipe(home)
    except RunError:  # a checkpoint without a run
        return LoadedModel.of(name, MSViT.from_pretrained(folder, fast_cpu=True))
    loaded = LoadedModel.of(title_of(name, folder), MSViT.from_pretrained(folder, fast_cpu=True))
    untrained = ""
    if home != folder or not recipe.training.epochs:
        untrained = "the dense stage: its gate is untrained"
    elif recipe.gating.by == "oracle":
        untrained = "trained with the oracle's masks, which know where the object is: the gate shown here is untrained"
    source, known = recipe.data.source, {"note": loaded.note or untrained}
    if source in BUILT_IN:
        known |= {"mean": Made.mean, "std": Made.std}
    if not loaded.segments:
        own = make(source, 8, recipe.data.size).classes if source in BUILT_IN else _saved_classes(home, source)
        known |= {"classes": tuple(own)} if len(own) == len(loaded.classes) else {}
    return replace(loaded, **known)


def _saved_classes(home: Path, data: str) -> list[str]:
    """Return the class names of a run: from its summary, or from the folders that it was trained on."""
    summary = home / "summary.json"
    if summary.is_file() and isinstance(classes := read_json(summary).get("classes"), list):
        return [plain(name) for name in classes]
    parts = [Path(data.partition(":")[2]) / split for split in ("train", "training")]
    part = next((p for p in parts if data.startswith("folder:") and p.is_dir()), None)
    return sorted(p.name for p in part.iterdir() if p.is_dir()) if part else []
