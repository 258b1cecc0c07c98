"""What trained models do to pictures: decisions, token counts, speed, and other thresholds than their own."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.fast_linear import fast_linear
from ..data.loaders import Loaders
from ..evaluation.predictions import object_finder
from ..gating.losses import make_loss
from ..models.msvit import MSViT
from ..plots import runs as figures
from ..training import runs
from ..training.budget import Budget
from ..training.build import load_data


@dataclass(frozen=True)
class Look:
    """A model and the first validation pictures as it sees them.

    Attributes:
        images: Normalised, `[B, 3, H, W]`.
        gates: Soft decisions, `[B, h, w]`.
        coarse: Decisions, bool `[B, h, w]`.
        tokens: Per picture, int64 `[B]`.
        predicted, targets: Numbers of the classes, int64 `[B]`.
        mean, std: What the pictures were normalised with.
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

    @property
    def correct(self) -> Tensor:
        """Whether the model names the class, bool `[B]`."""
        return self.predicted == self.targets


def open_run(folder: str | Path):
    """The model of a finished run, and the loaders of its pictures."""
    run = runs.read(folder)
    model = MSViT.from_pretrained(folder, fast_cpu=True)
    return run, model, load_data(run.recipe.data, run.recipe.training.seed, model)


def mask_of(run: runs.Run, model: MSViT, loaders: Loaders, indices: Tensor) -> Tensor | None:
    """All fine for a dense run, whose gate has learned nothing; the oracle's; None where the model decides."""
    if not run.recipe.training.epochs:
        return torch.zeros(model.grid(loaders.size), dtype=torch.bool)
    if run.recipe.gating.by == "oracle":
        return ~object_finder(loaders.val)(indices, model.coarse_patch)
    return None


@torch.no_grad()
def look(folder: str | Path, pictures: int = 512) -> Look:
    """Runs a trained model on the first validation pictures."""
    run, model, loaders = open_run(folder)
    seen, count = [], 0
    for batch in loaders.val:
        images, targets, indices = (part[: pictures - count] for part in batch)
        result = model.run(images, mask_of(run, model, loaders, indices))
        seen.append((images, result.gates, result.coarse, result.tokens, result.logits.argmax(1), targets))
        count += len(images)
        if count >= pictures:
            break
    return Look(model, *(torch.cat(part) for part in zip(*seen, strict=True)), loaders.mean, loaders.std)


def gate_maps(looks: Mapping[str, Look], count: int = 6, start: int = 0) -> Figure:
    """`figures.gate_maps` of several models on the same pictures, from number `start`."""
    first, part = next(iter(looks.values())), slice(start, start + count)
    decisions = {name: look.coarse[part] for name, look in looks.items()}
    model = first.model
    return figures.gate_maps(first.images[part], decisions, model.coarse_patch, model.scale, first.mean, first.std)


def token_counts(looks: Mapping[str, Look]) -> Figure:
    """`figures.token_counts` of several models of the same backbone."""
    model, coarse = (first := next(iter(looks.values()))).model, first.coarse[0]
    prefix = model.vit.num_prefix_tokens
    counts = {name: look.tokens for name, look in looks.items()}
    return figures.token_counts(counts, prefix + coarse.numel(), prefix + coarse.numel() * model.scale**2)


def gate_loss(folder: str | Path) -> nn.Module | None:
    """The GBaS loss of a run with the priors it has learned; None if the run was trained without."""
    path = Path(folder) / "gate_loss.safetensors"
    recipe = runs.read(folder).recipe
    if recipe.gating.loss != "gbas" or not path.exists():
        return None
    model = MSViT.from_pretrained(folder, fast_cpu=True)
    budget = Budget(model, (recipe.data.size, recipe.data.size), recipe.gating)
    loss = make_loss(recipe.gating.loss, budget.grid, budget.rate, **recipe.gating.loss_settings)
    loss.load_state_dict(load_file(path))
    return loss


class Shaped(NamedTuple):
    """A method that was trained with GBaS: its name, its loss with the priors, and its gates `[B, h, w]` on pictures.

    The gates are samples with noise, as in training: the priors are about these.
    """

    method: str
    loss: nn.Module
    gates: Tensor


def shaped(folder: Path, rows: pd.DataFrame) -> Shaped | None:
    """The first of some runs that was trained with GBaS."""
    for _, row in rows.iterrows():
        if (loss := gate_loss(folder / row["run"])) is not None:
            seen = look(folder / row["run"])
            gate = seen.model.gate.train()
            with torch.no_grad():
                return Shaped(row["method"], loss, gate.soften(gate(seen.images)))
    return None


def speeds(folder: Path, table: pd.DataFrame, batch: int = 32, repeats: int = 5) -> list[float]:
    """Pictures per second of each run's model on this machine, gate, tokenizer and head included.

    The models are timed in turns, so that whatever else the machine does hits all of them alike; medians over turns.
    """
    steps = []
    for name in table["run"]:
        run, model, loaders = open_run(folder / name)
        images, _, indices = (part[:batch] for part in next(iter(loaders.val)))
        mask = mask_of(run, model, loaders, indices)
        steps.append(
            (
                len(images),
                partial(MSViT.run, model, images, mask)
                if run.recipe.training.epochs
                else partial(_plain, model, images),
            )
        )
    turns = [[_seconds(step) for _, step in steps] for _ in range(repeats + 1)][1:]
    medians = [statistics.median(turn[i] for turn in turns) for i in range(len(steps))]
    return [count / seconds for (count, _), seconds in zip(steps, medians, strict=True)]


def _plain(model: MSViT, images: Tensor) -> Tensor:
    """The backbone alone, with the linear layers that all methods have."""
    with fast_linear(model.fast_cpu):
        return model.vit(images)


@torch.inference_mode()
def _seconds(step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


class Worth(NamedTuple):
    """The share of pictures that a model names, and its MACs as a share of the dense model's."""

    accuracy: float
    macs: float


@torch.no_grad()
def worth(look: Look, masks: Tensor | None = None, batch: int = 128) -> Worth:
    """What the model makes of these pictures as it decides now, or by other decisions, bool `[B, h, w]`."""
    images = look.images.split(batch)
    decisions = [None] * len(images) if masks is None else masks.split(batch)
    results = [look.model.run(part, mask) for part, mask in zip(images, decisions, strict=True)]
    correct = torch.cat([r.logits.argmax(1) for r in results]) == look.targets
    macs = torch.cat([r.macs for r in results]).mean().item() / look.model.dense_macs(look.images.shape[-2:])
    return Worth(correct.double().mean().item(), macs)


@torch.no_grad()
def threshold_curves(folder: Path, table: pd.DataFrame, curves: int, points: int, pictures: int) -> pd.DataFrame:
    """Accuracy and MACs of the most accurate learned gates at thresholds from nearly all coarse to nearly all fine."""
    columns = ["run", "label", "threshold", "accuracy", "macs"]
    learned = table[(table["epochs"] > 0) & (table["gating"] == "learned")]
    rows = []
    for _, entry in learned.sort_values("accuracy", ascending=False).drop_duplicates("label").head(curves).iterrows():
        seen = look(folder / entry["run"], pictures)
        model = seen.model
        for share in torch.linspace(0.05, 0.95, points):
            model.threshold = min(max(seen.gates.flatten().quantile(share).item(), 0.0), 1.0)
            rows.append((entry["run"], entry["label"], model.threshold, *worth(seen)))
    return pd.DataFrame(rows, columns=columns)
