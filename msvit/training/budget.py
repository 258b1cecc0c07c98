"""What a recipe's target means for a model, and the rule in the gate's place that is held to it."""

import math

import numpy as np
import torch

from ..data.loaders import Loaders
from ..gating.learned import Quota
from ..gating.rules import make_rule
from ..models.msvit import MSViT
from .recipe import LEARNED, GatingSettings, Recipe, RecipeError

BUDGETED = (*LEARNED, "centre", "border", "random", "entropy", "apt")  # who decides and is held to the target


class Budget:
    """What the target means for a model.

    Args:
        gating: None for a model that is trained with all tokens fine.

    Attributes:
        grid: Coarse regions (h, w).
        dense: MACs of the backbone alone.
        shares: `[hw + 1]`, the share of dense MACs by the number of coarse regions, gate and reducer included.
        rate: The share of coarse regions that belongs to the target.
        macs: The share of dense MACs at that rate.
    """

    def __init__(self, model: MSViT, size: tuple[int, int], gating: GatingSettings | None):
        patch = model.coarse_patch
        if wrong := [side for side in size if side % patch]:
            raise RecipeError(
                f"size={wrong[0]}: pictures must be a whole number of coarse patches of {patch} px; "
                f"use {max(wrong[0] // patch, 1) * patch}"
            )
        h, w = self.grid = model.grid(size)
        self.dense, self.rate = model.dense_macs(size), gating.target if gating else 0.0
        if gating is None or gating.by not in BUDGETED:
            return
        self.shares = model.macs_of(torch.arange(h * w + 1), size) / self.dense
        rates, shares = np.linspace(0, 1, h * w + 1), self.shares.numpy()
        if gating.budget == "macs":
            self.check("target", gating.target)
            self.rate = float(np.interp(gating.target, shares[::-1], rates[::-1]))
        self.macs = float(np.interp(self.rate, rates, shares))

    def check(self, name: str, share: float):
        """Raise unless some number of coarse regions costs this share of dense MACs."""
        most, least = self.shares[0].item(), self.shares[-1].item()
        if not least < share < most:
            raise RecipeError(
                f"{name}={share:g} cannot be met: this model's share of dense MACs is {least:.3f} with all regions "
                f"coarse and {most:.3f} with all fine; choose one between, or another scale"
            )


def choose_gate(model: MSViT, recipe: Recipe, loaders: Loaders) -> Budget:
    """Put a rule in the gate's place if the recipe says so; hold it, or a quota, to the budget as far as can be."""
    gating = recipe.gating if recipe.training.epochs else None
    if gating is None or gating.learned or gating.by == "oracle":
        budget = Budget(model, loaders.size, gating)
        if gating is not None and isinstance(model.gate, Quota):
            model.gate.rate = int((budget.shares - budget.macs).abs().argmin()) / math.prod(budget.grid)
        return budget
    device = model.cut.device
    model.gate = make_rule("fine")  # costs what every rule costs, nothing
    budget = Budget(model, loaders.size, gating)
    settings = {
        "centre": {"rate": budget.rate},
        "border": {"rate": budget.rate},
        "random": {"rate": budget.rate, "seed": recipe.training.seed},
        "entropy": {"mean": loaders.mean, "std": loaders.std} | gating.rule_settings,
    }
    name = "entropy" if gating.by == "apt" else gating.by
    try:
        model.gate = make_rule(name, **settings.get(name, {})).to(device)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if name == "entropy" and gating.calibrate:  # otherwise it keeps its own thresholds
        model.calibrate(loaders.first_pictures(), budget.macs)
    return budget
