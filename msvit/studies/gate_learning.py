"""What there is to win by choosing regions, and what of it a gate has learned.

For the pictures x with labels y, L(m) is the task's loss of a model whose regions are coarse where the mask m is 1.
What a region is worth is the true difference that it makes, all others as they are (`flips`):

    u_i = L(m with m_i = 1) − L(m with m_i = 0)

A gate that knows ranks the regions by −u. What is there to win at all lies between random masks and the masks that
a search finds that knows the labels (`winnings`, `greedy`): no gate can do better, few can do as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import IGNORE
from ..data.loaders import Loaders
from ..evaluation.predictions import object_finder
from ..gating.entropy import Entropy
from ..gating.gate import Decider
from ..gating.rules import from_centre
from ..models.msvit import MSViT
from ..plots.style import PictureStyle
from ..progress import bar, visible
from ..training.budget import Budget
from .inspect import first_of, open_run


class Answer(NamedTuple):
    """What a model makes of pictures under some masks: the loss of each, and whether it is right (a share)."""

    loss: Tensor
    right: Tensor


@torch.no_grad()
def answer(model: MSViT, images: Tensor, targets: Tensor, masks: Tensor, batch: int = 256) -> Answer:
    """Return loss and accuracy, `[B, M]` each, of pictures under masks, bool `[B, M, h, w]`."""
    count, losses, right = masks.shape[1], [], []
    with model.evaluating():
        for rows in torch.arange(masks.shape[0] * count, device=masks.device).split(batch):
            picture = rows // count
            logits = model.run(images[picture], masks.flatten(0, 1)[rows]).logits
            y = targets[picture]
            losses.append(_of_pictures(F.cross_entropy(logits.float(), y, reduction="none", ignore_index=IGNORE), y))
            right.append(_of_pictures((logits.argmax(1) == y).float(), y))
    return Answer(*(torch.cat(part).view(len(masks), count) for part in (losses, right)))


def _of_pictures(values: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over each picture's labelled pixels, `[B]`; a picture's label is one."""
    seen = targets != IGNORE
    return (values * seen).flatten(1).sum(1) / seen.flatten(1).sum(1).clamp(min=1) if values.dim() > 1 else values


def flips(model: MSViT, images: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
    """Return u `[B, h, w]`: what each region costs if it is coarse, all others as in the masks, bool `[B, h, w]`."""
    n = masks[0].numel()
    one = torch.eye(n, dtype=torch.bool, device=masks.device).view(1, n, *masks.shape[1:])
    coarse, fine = masks[:, None] | one, masks[:, None] & ~one
    loss = answer(model, images, targets, torch.cat([coarse, fine], 1)).loss
    return (loss[:, :n] - loss[:, n:]).view_as(masks)


def greedy(model: MSViT, images: Tensor, targets: Tensor, n_coarse: int) -> Tensor:
    """Return masks with `n_coarse` coarse regions each: all fine, then again and again the one that costs least."""
    grid = model.grid(images.shape[-2:])
    masks = torch.zeros(len(images), grid[0] * grid[1], dtype=torch.bool, device=images.device)
    one = torch.eye(masks.shape[1], dtype=torch.bool, device=images.device)
    for _ in range(n_coarse):
        tries = (masks[:, None] | one).unflatten(2, grid)
        loss = answer(model, images, targets, tries).loss.masked_fill(masks, torch.inf)
        masks = masks | one[loss.argmin(1)]
    return masks.unflatten(1, grid)


def random_masks(count: int, draws: int, grid: tuple[int, int], n_coarse: int, seed: int = 0) -> Tensor:
    """Return masks, bool `[count, draws, h, w]`, with `n_coarse` coarse regions each, every such mask as likely."""
    noise = torch.rand(count, draws, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed))
    return highest(noise.unflatten(2, grid), n_coarse)


def highest(scores: Tensor, n: int) -> Tensor:
    """Return the mask of the n highest scores of each picture, bool as `[..., h, w]`."""
    flat = scores.flatten(-2)
    return torch.zeros_like(flat, dtype=torch.bool).scatter(-1, flat.topk(n, -1).indices, True).view_as(scores)


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's rank correlation over the regions of each picture, `[B]`; equal values share their rank."""
    ranks = [torch.tensor(pd.DataFrame(x.flatten(1).double().cpu()).rank(axis=1).to_numpy()) for x in (a, b)]
    first, second = (r - r.mean(1, keepdim=True) for r in ranks)
    return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))


def gradient_signal(
    model: MSViT, images: Tensor, targets: Tensor, draws: int = 32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over the noise of dL/ds, the pull of the task at each score: `[B, h, w]` each.

    What a step of training sees is one draw.
    """
    pulls = []
    with model.evaluating(), torch.random.fork_rng(devices=[]):
        model.gate.train()  # the gate's noise alone: no dropout, no stochastic depth
        torch.manual_seed(seed)
        for _ in range(draws):
            result = model.run(images, execution="masked")
            loss = model.head.loss(result.logits, targets) * len(images)
            pulls.append(torch.autograd.grad(loss, result.scores)[0])
    pulls = torch.stack(pulls)
    return pulls.mean(0), pulls.std(0)


@torch.no_grad()
def scores_of(model: MSViT, loaders: Loaders, images: Tensor, objects: Tensor | None = None) -> dict[str, Tensor]:
    """Return scores of regions, `[B, h, w]` each, the highest to be coarse first, by who gives them.

    Args:
        objects: Where they are, bool `[B, h, w]`, if that is known.
    """
    grid = model.grid(images.shape[-2:])
    scores = {"gate": model.gate(images)} if isinstance(model.gate, Decider) else {}
    scores["entropy"] = Entropy(mean=loaders.mean, std=loaders.std).score(images, [grid])[0]
    scores["centre"] = from_centre(grid).expand(len(images), -1, -1)
    if objects is not None:
        scores["object"] = 1 - objects.float()
    return scores


def winnings(
    model: MSViT, images: Tensor, targets: Tensor, scores: dict[str, Tensor], n_coarse: int, draws: int = 200
) -> pd.DataFrame:
    """Return loss and accuracy with `n_coarse` coarse regions in every picture, by who chooses them.

    Rows: all fine; random masks (mean over `draws`, and the spread of the mean over the pictures from one draw to the
    next); the scores' own; and what is found by those who know the labels, the best of the random masks and `greedy`.
    """
    grid = model.grid(images.shape[-2:])
    fine = torch.zeros(len(images), 1, *grid, dtype=torch.bool)
    drawn = random_masks(len(images), draws, grid, n_coarse)
    guessed = answer(model, images, targets, drawn)
    best = guessed.loss.argmin(1, keepdim=True)
    found = {name: answer(model, images, targets, highest(score, n_coarse)[:, None]) for name, score in scores.items()}
    searched = greedy(model, images, targets, n_coarse)[:, None]
    rows = {
        "all fine": answer(model, images, targets, fine),
        "random": guessed,
        **found,
        f"best of {draws} random": Answer(*(part.gather(1, best) for part in guessed)),
        "greedy search": answer(model, images, targets, searched),
    }
    return pd.DataFrame(
        {
            "loss": {name: part.loss.mean().item() for name, part in rows.items()},
            "accuracy": {name: part.right.mean().item() for name, part in rows.items()},
            "loss_sd": {"random": guessed.loss.mean(0).std().item()},
        }
    ).loc[list(rows)]


@dataclass(frozen=True)
class Learned:
    """What a run's gate has learned, on the first pictures that it is evaluated on.

    Attributes:
        images: Normalised, `[B, 3, H, W]`.
        gates: Soft decisions, `[B, h, w]`.
        worth: The loss that each region saves if it stays fine, `[B, h, w]`, all others as the gate ranks them.
        scores: Of `scores_of`.
        winnings: Of `winnings`.
        pulls: Of `gradient_signal`.
        history: The run's metrics by epoch.
    """

    images: Tensor
    gates: Tensor
    worth: Tensor
    scores: dict[str, Tensor]
    winnings: pd.DataFrame
    pulls: tuple[Tensor, Tensor]
    history: pd.DataFrame
    drawing: PictureStyle

    @property
    def agreement(self) -> dict[str, Tensor]:
        """Spearman's correlation of the scores, turned round, with the regions' worth, `[B]`, by who gives them."""
        return {name: rank_correlation(-score, self.worth) for name, score in self.scores.items()}

    def first(self, count: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return pictures, the worth of their regions, and the scores."""
        return self.images[:count], self.worth[:count], {name: score[:count] for name, score in self.scores.items()}


def measure(folder: Path, pictures: int = 64, draws: int = 200) -> Learned:
    """Return what a finished run's gate has learned."""
    run, model, loaders = open_run(folder)
    images, targets, indices = (torch.cat(part) for part in zip(*first_of(loaders.val, pictures), strict=True))
    where = object_finder(loaders.val)
    scores = scores_of(model, loaders, images, where(indices, model.coarse_patch) if where else None)
    budget = Budget(model, images.shape[-2:], run.recipe.gating)
    n_coarse = round(budget.rate * scores["gate"][0].numel())
    with torch.no_grad():
        gates = model.decide(images).soft
    return Learned(
        images=images,
        gates=gates,
        worth=flips(model, images, targets, highest(scores["gate"], n_coarse)),
        scores=scores,
        winnings=winnings(model, images, targets, scores, n_coarse, draws),
        pulls=gradient_signal(model, images, targets),
        history=pd.DataFrame(run.metrics).query("stage == 'gated'"),
        drawing=PictureStyle(model.coarse_patch, model.scale, loaders.mean, loaders.std),
    )


def measure_runs(folder: Path, rows: pd.DataFrame, pictures: int = 64, draws: int = 200) -> dict[str, Learned]:
    """Return `measure` of each row's run, by the names of the methods."""
    there = bar(list(zip(rows["method"], rows["run"], strict=True)), "measuring gates", unit="runs", shown=visible())
    return {method: measure(folder / run, pictures, draws) for method, run in there}


def joined(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return tables one below another, their names in front."""
    return pd.concat(tables, names=["model", "who chooses"])
