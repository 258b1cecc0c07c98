"""What trained models do to pictures: decisions, token counts, speed, and other thresholds than their own."""

import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor, nn

from .. import plots
from ..core.fast_linear import fast_linear
from ..core.scales import token_sizes
from ..data.loaders import Loaders
from ..evaluation.predictions import object_finder, oracle_masks
from ..gating.losses import make_loss
from ..models.msvit import MSViT
from ..plots.style import PictureStyle
from ..progress import bar, visible
from ..training import runs
from ..training.budget import Budget
from ..training.build import load_data


@dataclass(frozen=True)
class Inspection:
    """A model and what it makes of the first validation pictures.

    Attributes:
        images: Normalised, `[B, 3, H, W]`.
        gates: Soft decisions, `[B, h, w]`.
        coarse: Decisions, bool `[B, h, w]`; of a quadtree the size of token over each region, see `token_sizes`.
        tokens: Per picture, int64 `[B]`.
        predicted, targets: Numbers of the classes, int64 `[B]`.
        mean, std: What the pictures were normalised with.
        classes: Their names.
    """

    model: MSViT
    images: Tensor
    gates: Tensor
    coarse: Tensor
    tokens: Tensor
    predicted: Tensor
    targets: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...] = ()

    @property
    def correct(self) -> Tensor:
        """Whether the predicted class is the right one, bool `[B]`."""
        return self.predicted == self.targets

    @property
    def mixed(self) -> bool:
        """Whether some regions are coarse and others fine."""
        return bool(self.coarse.any() and not self.coarse.all())

    @property
    def drawing(self) -> PictureStyle:
        """How the functions of `plots` draw the pictures and their tokens."""
        return PictureStyle(self.model.coarse_patch, self.model.scale, self.mean, self.std)


def open_run(folder: str | Path) -> tuple[runs.Run, MSViT, Loaders]:
    """Return a finished run, its model, and the loaders of its pictures."""
    run = runs.read(folder)
    model = runs.load_model(folder, fast_cpu=True)
    return run, model, load_data(run.recipe.data, run.recipe.training.seed, model)


def mask_of(run: runs.Run, model: MSViT, loaders: Loaders, indices: Tensor) -> list[Tensor] | None:
    """Return all fine for a dense run, whose gate has learned nothing; the oracle's mask; None if the model decides."""
    if not run.recipe.training.epochs:
        return model.all_fine(loaders.size)
    if run.recipe.gating.by == "oracle":
        return oracle_masks(model, object_finder(loaders.val), indices, loaders.size)
    return None


def first_of(loader: Iterable, pictures: int) -> Iterator[list[Tensor]]:
    """Yield the batches of a loader up to so many pictures: images, targets, indices."""
    count = 0
    for batch in loader:
        part = [rows[: pictures - count] for rows in batch]
        yield part
        count += len(part[0])
        if count >= pictures:
            break


@torch.no_grad()
def inspect_run(folder: str | Path, pictures: int = 512) -> Inspection:
    """Run a trained model on the first validation pictures."""
    run, model, loaders = open_run(folder)
    seen = []
    for images, targets, indices in first_of(loaders.val, pictures):
        result = model.run(images, mask_of(run, model, loaders, indices))
        coarse = token_sizes(result.gating.undivided) if len(model.scales) > 2 else result.coarse
        seen.append((images, result.gates, coarse, result.tokens, result.logits.argmax(1), targets))
    return Inspection(
        model, *(torch.cat(part) for part in zip(*seen, strict=True)), loaders.mean, loaders.std, tuple(loaders.classes)
    )


def inspect_runs(folder: Path, rows: pd.DataFrame, pictures: int = 512) -> dict[str, Inspection]:
    """Return `inspect_run` of each row's run, by the names of the methods."""
    there = bar(list(zip(rows["method"], rows["run"], strict=True)), "looking at runs", unit="runs", shown=visible())
    return {method: inspect_run(folder / run, pictures) for method, run in there}


def draw_gate_maps(inspections: Mapping[str, Inspection], count: int = 6, start: int = 0) -> Figure:
    """Draw the tokens of several models on the same pictures, from number `start`."""
    first, part = next(iter(inspections.values())), slice(start, start + count)
    decisions = {name: inspection.coarse[part] for name, inspection in inspections.items()}
    words = None
    if first.classes and first.targets.dim() == 1:
        words = {name: predictions(inspection, part) for name, inspection in inspections.items()}
        words[""] = [first.classes[k] for k in first.targets[part].tolist()]
    return plots.gate_maps(first.images[part], decisions, first.drawing, words)


def predictions(inspection: Inspection, part: slice) -> list[str]:
    """Return the predicted class of some pictures, with a cross where it is wrong."""
    pairs = zip(inspection.predicted[part].tolist(), inspection.correct[part].tolist(), strict=True)
    return [f"{inspection.classes[k]} {'✓' if right else '✗'}" for k, right in pairs]


def draw_token_counts(inspections: Mapping[str, Inspection]) -> Figure:
    """Draw how many tokens pictures get from several models of the same backbone."""
    model, coarse = (first := next(iter(inspections.values()))).model, first.coarse[0]
    prefix = model.vit.num_prefix_tokens
    counts = {name: inspection.tokens for name, inspection in inspections.items()}
    lowest, highest = prefix + coarse.numel(), prefix + coarse.numel() * model.scale**2
    return plots.token_counts(counts, lowest, highest, model.scale**2 - 1)


class ShapedGates(NamedTuple):
    """A method that was trained with GBaS: its name, its loss with the priors, and its gates `[B, h, w]` on pictures.

    The gates are samples with noise, as in training: the priors are about these.
    """

    method: str
    loss: nn.Module
    gates: Tensor


def find_shaped(folder: Path, rows: pd.DataFrame) -> ShapedGates | None:
    """Return the gates of the first row of two scales that was trained with GBaS; None if there is none."""
    for method, name in zip(rows["method"], rows["run"], strict=True):
        path, recipe = folder / name / "gate_loss.safetensors", runs.read(folder / name).recipe
        if recipe.gating.loss != "gbas" or recipe.model.scales[2:] or not path.exists():
            continue
        inspection = inspect_run(folder / name)
        budget = Budget(inspection.model, inspection.images.shape[-2:], recipe.gating)
        loss = make_loss("gbas", budget.grid, budget.rate, **recipe.gating.loss_settings)
        loss.load_state_dict(load_file(path))
        gate = inspection.model.gate.train()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same noise every time
            return ShapedGates(method, loss, gate.soften(gate(inspection.images)))
    return None


def speeds(folder: Path, table: pd.DataFrame, batch: int = 32, repeats: int = 5) -> list[float]:
    """Measure the pictures per second of each run's model on this machine, gate, tokenizer and head included.

    The models are timed in turns, so that whatever else the machine does hits all of them alike; medians over turns.
    """
    counts, calls = [], []
    for name in bar(table["run"].tolist(), "opening runs to time", unit="runs", shown=visible()):
        run, model, loaders = open_run(folder / name)
        images, _, indices = (part[:batch] for part in next(iter(loaders.val)))
        mask = mask_of(run, model, loaders, indices)
        gated = run.recipe.training.epochs
        calls.append(partial(MSViT.run, model, images, mask) if gated else partial(_backbone, model, images))
        counts.append(len(images))
    with torch.inference_mode():
        rounds = bar(range(repeats + 1), "timing all in turns", unit="turns", shown=visible())
        turns = [[timeit(call, number=1) for call in calls] for _ in rounds][1:]  # the first is a warm-up
    return [count / statistics.median(seconds) for count, *seconds in zip(counts, *turns, strict=True)]


def _backbone(model: MSViT, images: Tensor) -> Tensor:
    """Run the backbone alone, with the linear layers that all methods have."""
    with fast_linear(model.fast_cpu):
        return model.vit(images)


def clock_remark(table: pd.DataFrame, by: str = "method") -> str:
    """Return in words what `speeds` says of the gated models, beside the dense one; empty if there is no such pair.

    Args:
        table: Runs with `pictures_per_s`, `macs`, `dense_macs` and `epochs` or a method "dense".
    """
    dense, gated = table[table["method"] == "dense"], table[table["macs"] < 0.99]
    if dense.empty or gated.empty:
        return ""
    pace = gated.groupby(by, sort=False)[["pictures_per_s", "macs"]].mean()
    best, base = pace["pictures_per_s"].idxmax(), dense["pictures_per_s"].mean()
    gain, macs = pace.loc[best, "pictures_per_s"] / base, pace.loc[best, "macs"]
    text = f"On the clock here: dense {base:,.0f} pictures/s; the fastest other row, {best}, {gain:.2f} times that at "
    text += f"{macs:.0%} of the MACs."
    if gain < 1:
        text += (
            f" A picture costs {dense['dense_macs'].mean() / 1e6:.0f} M MACs, so little that the steps around the "
            "matrix products take longer than these; `make bench` times "
            "larger ones."
        )
    return text


class AccuracyAndMacs(NamedTuple):
    """The share of pictures that are classified right, and the MACs as a share of the dense model's."""

    accuracy: float
    macs: float


@torch.no_grad()
def accuracy_and_macs(inspection: Inspection, masks: Tensor | None = None, batch: int = 128) -> AccuracyAndMacs:
    """Evaluate a model on its pictures as it decides now, or by other decisions, bool `[B, h, w]`."""
    model, images = inspection.model, inspection.images.split(batch)
    decisions = [None] * len(images) if masks is None else masks.split(batch)
    results = [model.run(part, mask) for part, mask in zip(images, decisions, strict=True)]
    correct = torch.cat([r.logits.argmax(1) for r in results]) == inspection.targets
    macs = torch.cat([r.macs for r in results]).mean().item() / model.dense_macs(inspection.images.shape[-2:])
    return AccuracyAndMacs(correct.double().mean().item(), macs)


def best_gates(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """Return the runs of the most accurate learned gates, one of each label."""
    learned = table[(table["epochs"] > 0) & (table["gating"] == "learned")]
    return learned.sort_values("accuracy", ascending=False).drop_duplicates("label").head(count)


@torch.no_grad()
def threshold_curves(folder: Path, table: pd.DataFrame, curves: int, points: int, pictures: int) -> pd.DataFrame:
    """Evaluate the most accurate learned gates at thresholds from nearly all coarse to nearly all fine."""
    rows = []
    for entry in bar(best_gates(table, curves).to_dict("records"), "threshold curves", unit="runs", shown=visible()):
        inspection = inspect_run(folder / entry["run"], pictures)
        model, gates = inspection.model, inspection.gates.flatten()
        for share in torch.linspace(0.05, 0.95, points):
            model.threshold = min(max(gates.quantile(share).item(), 0.0), 1.0)
            rows.append((entry["run"], entry["label"], model.threshold, *accuracy_and_macs(inspection)))
    return pd.DataFrame(rows, columns=["run", "label", "threshold", "accuracy", "macs"])
