"""Cases: a batch of pictures on a gated model, with random weights or a run's own."""

import copy
import math
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import timm
import torch
from torch import Tensor, nn

from ..checks import closest
from ..core import backbone
from ..core.macs import linear_macs
from ..core.scales import check_room, spread
from ..gating.gate import Gate
from ..models.calibrate import nearest_to_budget, thresholds
from ..models.fit_reducer import fit_reducer
from ..models.msvit import MSViT, Result
from ..models.names import TIMM_MODULES
from ..reducers.registry import REDUCERS
from ..training.build import load_data
from ..training.files import RunError
from ..training.recipe import RecipeError
from ..training.runs import load_model, read_finished
from .settings import BenchSettings, CaseSettings

TRAINING_SHARE = 0.6  # of coarse regions in the training steps


class Unavailable(RuntimeError):
    """A method that this model or machine cannot have, and why."""


class Case:
    """A batch of pictures and a gated model in evaluation mode, on which methods are timed.

    Args:
        model: Its threshold says which regions are coarse.
        fits: Reducer -> settings that match its MACs to the packed model's.
    """

    def __init__(self, model: MSViT, images: Tensor, fits: dict[str, dict[str, Any]]):
        self.model, self.vit, self.images, self.fits = model, model.vit, images, fits
        self.batch, self.size = len(images), images.shape[-2:]
        self.dense_macs = self.batch * (model.dense_macs(self.size) + self.once_macs)
        self.dense_tokens = self.vit.num_prefix_tokens + self.regions * model.scale**2

    def first(self, batch: int) -> "Case":
        """Return a case of the first pictures alone."""
        return Case(self.model, self.images[:batch], self.fits)

    @property
    def regions(self) -> int:
        """How many regions a picture has."""
        return math.prod(self.model.grid(self.size))

    @property
    def undivided(self) -> list[Tensor]:
        """How many regions of each size lie within one token, `[B]`."""
        return [(u > 0.5).sum((1, 2)) for u in self.result.gating.undivided]

    @property
    def once_macs(self) -> int:
        """MACs of attention pooling's latent query, in no closed form: MSViT projects it once a batch, timm B times."""
        pool = self.vit.attn_pool
        return 0 if pool is None else pool.latent_len * linear_macs(pool.q)

    @torch.inference_mode()
    def set_share(self, coarse: float):
        """Set the model's threshold so that this share of all regions is coarse.

        With more than two scales half of these lie within one token of the next size, half of those in the next …
        """
        if len(self.model.scales) > 2:
            _set_shares(self.model, self.images, coarse)
            vars(self).pop("result", None)
            return
        soft = self.model.decide(self.images).soft

        def fine(threshold: Tensor) -> int:
            return int((soft <= threshold).sum())

        n_fine = soft.numel() - round(coarse * soft.numel())
        self.model.threshold = nearest_to_budget(thresholds(soft), fine, n_fine).item()
        vars(self).pop("result", None)

    @cached_property
    @torch.inference_mode()
    def result(self) -> Result:
        """What the packed model computes."""
        return self.model.run(self.images)

    @cached_property
    def trained(self) -> MSViT:
        """A copy in training mode and float32, whose gate makes TRAINING_SHARE of the regions coarse."""
        if self.model.reducer is not None or type(self.model.gate) is not Gate:
            raise Unavailable("training steps are timed with a gate for two scales, and without a reducer")
        model = copy.deepcopy(self.model).float().train().requires_grad_(True)
        _set_noisy_share(model.gate, self.images.float(), TRAINING_SHARE)
        return model

    def variant(self, gate: nn.Module, reducer: nn.Module | None = None, threshold: float = 0.5) -> MSViT:
        """Return another model around the same backbone."""
        model = MSViT(self.vit, self.model.scale, gate, reducer=reducer, fast_cpu=True).eval()
        model.cut = self.model.cut.clone().fill_(threshold)
        return model


def _shares(coarse: float, sizes: int) -> list[float]:
    """Return what share of the regions of each size lies within one token: half of the share of the size before."""
    return [coarse / 2**level for level in range(sizes)]


@torch.no_grad()
def _set_shares(model: MSViT, images: Tensor, coarse: float):
    """Move the gates' biases so that `_shares` of the regions are undivided, from the largest regions down."""
    model.threshold, whole, shares = 0.5, None, _shares(coarse, len(model.scales) - 1)
    levels = zip(model.gate.levels, model.grids(images.shape[-2:]), shares, strict=True)
    for gate, grid, share in reversed(list(levels)):
        scores = gate(images)
        closed = torch.zeros_like(scores) if whole is None else spread(whole, grid)
        asked = scores[closed < 0.5].sort(descending=True).values
        count = min(max(round(share * scores.numel() - closed.sum().item()), 0), len(asked))
        ends = asked[:1] + 1, asked[-1:] - 1
        gate.bias.sub_(torch.cat([ends[0], asked, ends[1]])[count : count + 2].mean())
        whole = (gate(images) > 0).float().maximum(closed)


@torch.no_grad()
def _set_noisy_share(gate: Gate, images: Tensor, share: float):
    """Move the gate's bias so that its noisy decisions make this share of the regions coarse."""
    scores, step = gate(images).double(), 2.0**-40

    def coarse(steps: int) -> float:
        return (scores + step * steps).sigmoid().mean().item()

    gate.mlp[-1].bias += step * nearest_to_budget(range(-(2**50), 2**50), coarse, share)


def load_case(settings: BenchSettings, cases: Sequence[CaseSettings], device: torch.device) -> Case:
    """Return a case with pictures enough for all of `cases`, which have one model and one size.

    A backbone with random weights and a new gate on random pictures, or a run's own model and pictures.
    """
    torch.manual_seed(0)
    most = max(case.batch for case in cases)
    if settings.run:
        model, images = _load_run(settings.run, most)
        with torch.inference_mode():
            macs = model.run(images[:32]).macs.mean().item()
    else:
        model = new_model(cases[0])
        sides = model.vit.patch_embed.img_size
        pairs = zip(_shares(settings.coarse, len(model.scales) - 1), model.grids(sides), strict=True)
        macs = model.macs_of([torch.tensor([round(share * math.prod(grid))]) for share, grid in pairs], sides).item()
        images = torch.randn(most, model.vit.patch_embed.proj.in_channels, *sides)
    share, fits = macs / model.dense_macs(images.shape[-2:]), {}
    for name in (name for name in settings.methods() if name in REDUCERS):
        with suppress(ValueError):  # one that this backbone cannot have; its line in the table says so
            fits[name] = fit_reducer(name, model.vit, share, images=images[:8])
    cut, dtype = model.cut.clone(), getattr(torch, settings.dtype)
    model.to(device, dtype).requires_grad_(False)
    model.cut = cut.to(device)  # bfloat16 could not tell thresholds apart
    return Case(model, images.to(device, dtype), fits)


def new_model(case: CaseSettings) -> MSViT:
    """Return a model with random weights, or raise a `RecipeError` if there is none for this case."""
    if not timm.is_model(case.model):
        known = timm.list_models(module=[*TIMM_MODULES, "zoo"])
        near = ", ".join(closest(case.model, known, 3)) or "see timm.list_models('*vit*')"
        raise RecipeError(f"timm has no model {case.model!r}; the nearest: {near}")
    try:
        vit = timm.create_model(case.model, **({} if case.size is None else {"img_size": case.size}))
        model = MSViT(vit, fast_cpu=True, scales=case.scales).eval()
        for gate in model.gate.levels:
            gate.count_as_trained()
        sides = vit.patch_embed.img_size
        check_room(model.scales, model.grid(sides), backbone.patch_size(vit), sides)
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"{case.model} cannot be timed: {error}") from error
    side, patch = sides[0], model.coarse_patch
    if any(side % patch for side in sides):
        raise RecipeError(
            f"{case.model} takes pictures of {side} px here, no whole number of coarse patches of {patch} px; "
            f"use --size {max(side // patch, 1) * patch}"
        )
    return model


def _load_run(folder: str, most: int) -> tuple[MSViT, Tensor]:
    """Return a run's model, and so many of its validation pictures."""
    run, images = read_finished(folder), []
    model = load_model(folder, fast_cpu=True).eval()
    if model.head.dense:
        raise RunError(f"{folder} segments; the bench times classifiers against timm's own")
    for batch in load_data(run.recipe.data, run.recipe.training.seed, model).val:
        images.append(batch.images)
        if sum(map(len, images)) >= most:
            return model, torch.cat(images)[:most]
    raise RecipeError(f"batch={most}: the run has {sum(map(len, images))} validation pictures; use a smaller batch")
