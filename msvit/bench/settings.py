"""What is measured: the settings of `msvit bench`, its options, and the batches that follow from them."""

import argparse
import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import timm
import torch

from ..checks import one_of
from ..training.recipe import RecipeError, setting
from .cases import ROWS

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
UNUSUAL = ", ".join(name for name, row in ROWS.items() if not row.usual)
SIZES, SHARES = (224, 384, 512, 768, 1024), (0.0, 0.25, 0.5, 0.75, 1.0)  # of --scaling
Tell = Callable[[str], object]  # of a line about what goes on


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and where the answer goes."""

    models: tuple[str, ...] = setting(("vit_small_patch16_224",), "timm names")
    size: tuple[int, ...] = setting((), "sides of the pictures in pixels; none = the backbone's own")
    batch: tuple[int, ...] = setting((1, 32), "pictures at once; training steps take the largest")
    coarse: float = setting(0.5, "share of coarse regions that the gate is set to")
    dtype: str = setting("float32", "|".join(DTYPES))
    device: str = setting("auto", "auto|cpu|cuda")
    repeats: int = setting(0, "turns; 0 = 5 on a CPU, 50 on CUDA; half as many for training steps")
    rows: tuple[str, ...] = setting((), f"rows to time, as in 'packed,dense*'; none = all but {UNUSUAL}")
    train: bool = setting(True, "time training steps too")
    memory: bool | None = setting(None, "look at the memory that each row takes; it costs time on a CPU, none on CUDA")
    run: str = setting("", "a finished run's folder: its model, at its threshold, on its validation pictures")
    scaling: bool = setting(False, "dense against packed by picture size, by batch and by share of coarse regions")
    out: str = setting("reports/bench", "folder of the files that are written")

    def __post_init__(self):
        one_of("dtype", self.dtype, DTYPES, RecipeError)
        one_of("device", self.device, ("auto", "cpu", "cuda"), RecipeError)
        if not 0 <= self.coarse <= 1:
            raise RecipeError(f"coarse={self.coarse:g}: the share of coarse regions lies in [0, 1]")
        if wrong := [n for n in (*self.batch, *self.size) if n < 1] + [self.repeats] * (self.repeats < 0):
            raise RecipeError(f"{wrong[0]} is no number of pictures, pixels or turns; use 1, 2, 3 …")
        if not self.models or not self.batch:
            raise RecipeError("models and batch need one value at least")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RecipeError("device='cuda': this PyTorch sees no CUDA device; use cpu")
        if self.scaling and self.run:
            raise RecipeError("a run has pictures of one size; scaling is measured without --run")
        for name in () if self.run else self.models:
            if not timm.is_model(name):
                known = [*timm.list_models(module=["vision_transformer", "deit"]), *timm.list_models(module="zoo")]
                near = ", ".join(difflib.get_close_matches(name, known, 3)) or "see timm.list_models('*vit*')"
                raise RecipeError(f"timm has no model {name!r}; the nearest: {near}")
        self.wanted()

    def wanted(self) -> list[str]:
        """The rows to time, in the table's order; what they are held against is among them."""
        usual = ("dense", "dense-linear", "packed") if self.scaling else [n for n, row in ROWS.items() if row.usual]
        chosen = set() if self.rows else set(usual)
        for pattern in self.rows:
            found = fnmatch.filter(ROWS, pattern)
            if not found:
                near = difflib.get_close_matches(pattern, ROWS, 1, cutoff=0.4)
                hint = f"; the nearest is {near[0]!r}" if near else ""
                raise RecipeError(f"no row is called {pattern!r}{hint}. There are: {', '.join(ROWS)}")
            chosen |= set(found)
        chosen |= {"dense"} | {ROWS[name].of for name in chosen}
        if not self.train or self.scaling:
            chosen = {name for name in chosen if ROWS[name].kind != "training"}
        return [name for name in ROWS if name in chosen]

    @property
    def place(self) -> torch.device:
        cuda = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        return torch.device("cuda" if cuda else "cpu")

    @property
    def turns(self) -> int:
        return self.repeats or (50 if self.place.type == "cuda" else 5)


class Plan(NamedTuple):
    """A batch to measure; `axis` is what is being varied, in a scaling."""

    model: str
    size: int | None
    batch: int
    coarse: float
    axis: str = ""


def plans(settings: Settings) -> Iterator[Plan]:
    """In the order of measuring: one backbone after the other."""
    most = max(settings.batch)
    for model in (settings.run,) if settings.run else settings.models:
        if not settings.scaling:
            for size in settings.size or (None,):
                yield from (Plan(model, size, batch, settings.coarse) for batch in settings.batch)
            continue
        powers = [2**i for i in range(most.bit_length()) if 2**i <= most]
        yield from (Plan(model, None, batch, settings.coarse, "batch") for batch in powers)
        yield from (Plan(model, None, most, share, "coarse") for share in SHARES)
        yield from (Plan(model, size, settings.batch[0], settings.coarse, "size") for size in settings.size or SIZES)


def add_options(parser: argparse.ArgumentParser):
    """An option for each setting: its comment is the help."""
    for field in dataclasses.fields(Settings):
        default = getattr(Settings(), field.name)
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
        about = field.metadata["about"] + ("" if shown in ("", None) or shown is False else f" (default: {shown})")
        if field.type in (bool, bool | None):
            option: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif field.type in (int, float, str):
            option = {"type": field.type, "metavar": {int: "N", float: "X", str: "TEXT"}[field.type]}
        else:
            whole = field.type == tuple[int, ...]
            option = {"type": partial(_several, int if whole else str), "metavar": "N,N" if whole else "NAME,NAME"}
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=default, help=about.replace("%", "%%"), **option)


def _several(kind: type, text: str) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers with commas between them") from None


def from_options(options: dict[str, Any]) -> Settings:
    return Settings(**{field.name: options[field.name] for field in dataclasses.fields(Settings)})
