"""Settings of `msvit bench`, the methods that it can time, and the cases that follow from them. Light to import.

A case is a batch of pictures on a model, a method a line of the table (what is timed on a case), a timing what the
clock says of a method, and a report all timings of a command with the environment they were taken in.
"""

import argparse
import dataclasses
import fnmatch
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, get_args

from ..checks import in_interval, one_of
from ..training.settings import RecipeError, setting


class BenchMethod(NamedTuple):
    """A line of the table; `bench.methods.PREPARE` has the function that makes it ready on a case.

    Attributes:
        kind: "model" and "training" are held against the dense methods of their kind, "part" against the method `of`.
        usual: Whether it is timed without being asked for.
        compiled: Its products are hidden from the count, and it may fail for want of a compiler.
    """

    label: str
    kind: str = "model"
    of: str = "dense"
    usual: bool = True
    compiled: bool = False


_train = partial(BenchMethod, kind="training", of="train-dense")
_part = partial(BenchMethod, kind="part")
_reducers = ("dynamicvit", "token_pooling", "power_bert", "grid", "strided_convolution", "random_pruning")
_reducers += ("importance_sampling", "evit", "tome", "diffrate", "algm", "pitome")
BENCH_METHODS = {
    "dense": BenchMethod("dense timm"),
    "dense-linear": BenchMethod("dense, same linear layers"),
    "dense-compiled": BenchMethod("dense compiled", compiled=True),
    "packed": BenchMethod("MSViT packed"),
    "packed-compiled": BenchMethod("MSViT packed, rows' work compiled", usual=False, compiled=True),
    "fine": BenchMethod("MSViT packed, all fine"),
    "masked": BenchMethod("MSViT masked"),
    **{name: BenchMethod(name) for name in _reducers},
    "gate": _part("gate + tokenizer", of="packed"),
    "embedding": _part("of which embedding", of="packed"),
    "block": _part("one block, all tokens", usual=False),
    "kmeans": _part("K-means in it, to half", of="block", usual=False),
    "kmedoids": _part("K-medoids in it, to half", of="block", usual=False),
    "train-dense": _train("training step, dense timm"),
    "train-dense-linear": _train("training step, dense, same linear layers"),
    "train-masked": _train("training step, masked"),
    "train-trimmed": _train("training step, trimmed"),
}
USUAL_METHODS = tuple(name for name, method in BENCH_METHODS.items() if method.usual)
SCALING_METHODS = ("dense", "dense-linear", "packed")
SCALING_SIZES, SCALING_SHARES = (224, 384, 512, 768, 1024), (0.0, 0.25, 0.5, 0.75, 1.0)
_unusual = ", ".join(name for name in BENCH_METHODS if name not in USUAL_METHODS)


@dataclasses.dataclass(frozen=True)
class BenchSettings:
    """What is measured, and where the report goes."""

    models: tuple[str, ...] = setting(("vit_small_patch16_224",), "timm names")
    size: tuple[int, ...] = setting((), "sides of the pictures in pixels; none = the backbone's own", "[1, inf)")
    scales: tuple[int, ...] = setting((1, 2), "sides of tokens in fine patches, as in 1,2,4", "[1, 64]")
    batch: tuple[int, ...] = setting((1, 32), "pictures at once; training steps take the largest", "[1, inf)")
    coarse: float = setting(0.5, "share of coarse regions that the gate is set to", "[0, 1]")
    dtype: str = setting("float32", "of weights and pictures", choices=("float32", "bfloat16", "float16"))
    device: str = setting("auto", "auto = CUDA if there is one", choices=("auto", "cpu", "cuda"))
    repeats: int = setting(
        0, "calls of each method; 0 = 5 on a CPU, 50 on CUDA; half as many for training steps", "[0, inf)"
    )
    rows: tuple[str, ...] = setting((), f"methods to time, as in 'packed,dense*'; none = all but {_unusual}")
    train: bool = setting(True, "time training steps too")
    memory: bool | None = setting(None, "measure the memory of each method; it costs time on a CPU, none on CUDA")
    run: str = setting("", "a finished run's folder: its model, at its threshold, on its validation pictures")
    scaling: bool = setting(False, "dense against packed by picture size, by batch and by share of coarse regions")
    out: str = setting("results/bench", "folder of the files that are written")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, within, choices = getattr(self, field.name), field.metadata["within"], field.metadata["choices"]
            for one in value if isinstance(value, tuple) else (value,):
                if choices:
                    one_of(field.name, one, choices, RecipeError)
                if within:
                    in_interval(field.name, one, within, RecipeError)
        if not self.models or not self.batch:
            raise RecipeError("models and batch need one value at least")
        if self.scaling and self.run:
            raise RecipeError("a run has pictures of one size; scaling is measured without --run")
        self.methods()

    def methods(self) -> list[str]:
        """Return the methods to time, in the table's order; those that they are held against are among them."""
        chosen = set() if self.rows else set(SCALING_METHODS if self.scaling else USUAL_METHODS)
        for pattern in self.rows:
            found = fnmatch.filter(BENCH_METHODS, pattern)
            chosen |= set(found or [one_of("rows", pattern, BENCH_METHODS, RecipeError)])
        chosen |= {"dense"} | {BENCH_METHODS[name].of for name in chosen}
        if not self.train or self.scaling:
            chosen = {name for name in chosen if BENCH_METHODS[name].kind != "training"}
        return [name for name in BENCH_METHODS if name in chosen]


class CaseSettings(NamedTuple):
    """A case to measure: a timm name or a run's folder, sides (None: its own), pictures, and their share of coarse.

    `axis` is the setting that is being varied, in a scaling.
    """

    model: str
    size: int | None
    batch: int
    coarse: float
    axis: str = ""
    scales: tuple[int, ...] = (1, 2)


def case_settings(settings: BenchSettings) -> Iterator[CaseSettings]:
    """Yield the cases in the order of measuring: one model after the other, and each at one size after the other."""
    most = max(settings.batch)
    for model in (settings.run,) if settings.run else settings.models:
        case = CaseSettings(model, None, most, settings.coarse, scales=settings.scales)
        if settings.scaling:
            powers = [2**i for i in range(most.bit_length()) if 2**i <= most]
            yield from (case._replace(batch=batch, axis="batch") for batch in powers)
            yield from (case._replace(coarse=share, axis="coarse") for share in SCALING_SHARES)
            sizes, first = settings.size or SCALING_SIZES, settings.batch[0]
            yield from (case._replace(size=size, batch=first, axis="size") for size in sizes)
        else:
            for size in settings.size or (None,):
                yield from (case._replace(size=size, batch=batch) for batch in settings.batch)


def add_options(parser: argparse.ArgumentParser):
    """Add an option for each setting: its comment is the help."""
    for field in dataclasses.fields(BenchSettings):
        kind, choices = (get_args(field.type) or (field.type,))[0], field.metadata["choices"]
        several = isinstance(field.default, tuple)
        shown = ",".join(map(str, field.default)) if several else field.default
        about = field.metadata["about"] + ("" if shown in ("", None) or shown is False else f" (default: {shown})")
        if kind is bool:
            option: dict[str, Any] = {"action": argparse.BooleanOptionalAction}
        elif several:
            option = {"type": partial(_split, kind), "metavar": {int: "N,N", str: "NAME,NAME"}[kind]}
        else:
            option = {"type": kind, "metavar": "|".join(choices) or {int: "N", float: "X", str: "TEXT"}[kind]}
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, default=field.default, help=about.replace("%", "%%"), **option)


def from_options(options: dict[str, Any]) -> BenchSettings:
    """Return the settings among what was typed."""
    return BenchSettings(**{field.name: options[field.name] for field in dataclasses.fields(BenchSettings)})


def _split(kind: type, text: str) -> tuple:
    try:
        return tuple(kind(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected whole numbers with commas between them") from None
