"""What a recipe's target means for a model, and the rule in the gate's place that is held to it."""

import math

import numpy as np
import torch

from ..core.scales import check_room, checked_scales, nested
from ..data.loaders import Loaders
from ..gating.learned import Quota
from ..gating.rules import make_rule
from ..models.calibrate import nearest_to_budget
from ..models.msvit import MSViT
from .recipe import BOUNDED, LEARNED, GatingSettings, Recipe, RecipeError
from .teach_gate import detail

# Of each size of regions in a rule's own unit; a budget moves them together.
THRESHOLDS = {"entropy": (5.5, 4.5, 3.5), "psnr": (30.0, 30.0, 30.0), "equality": (0.0, 0.0, 0.0)}
BUDGETED = (*LEARNED, "centre", "border", "random", *BOUNDED)  # who decides and is held to the target


class Budget:
    """What the target means for a model.

    A quadtree's target is one budget of MACs over all sizes of regions. Unless `targets` says what share of each size's
    regions is to be undivided, it is split: for a gate at one bound on what averaging a region of any size throws away
    (`teach_gate.detail`), for a rule at one share of the regions of each size that are asked.

    Args:
        gating: None for a model that is trained with all tokens fine.
        loaders: Whose training pictures a gate's budget is split on; without them, as for a rule.

    Attributes:
        size: Of the pictures.
        grids: Regions (h, w) of each size that is decided about, from small to large; `grid` are the first.
        dense: MACs of the backbone alone.
        shares: Of two scales `[hw + 1]`, the share of dense MACs by the number of coarse regions, gate and reducer
            included.
        rates: The shares of undivided regions that belong to the target, by size; `rate` is the first.
        macs: The share of dense MACs at these rates.
    """

    def __init__(
        self, model: MSViT, size: tuple[int, int], gating: GatingSettings | None, loaders: Loaders | None = None
    ):
        patch = model.coarse_patch
        if wrong := [side for side in size if side % patch]:
            raise RecipeError(
                f"size={wrong[0]}: pictures must be a whole number of coarse patches of {patch} px; "
                f"use {max(wrong[0] // patch, 1) * patch}"
            )
        try:
            check_room(model.scales, model.grid(size), patch // model.scale, size)
        except ValueError as error:
            raise RecipeError(str(error)) from error
        self.size, self.grids, self.dense = tuple(size), model.grids(size), model.dense_macs(size)
        self.grid, self.model = self.grids[0], model
        self.rates = [gating.target if gating else 0.0] * len(self.grids)
        if gating is None or gating.by not in BUDGETED:
            return
        if gating.targets and len(gating.targets) != len(self.grids):
            raise RecipeError(
                f"targets={gating.targets}: give {len(self.grids)}, one for each size of regions, or none; this model "
                f"has scales={model.scales}"
            )
        if gating.targets and gating.targets != sorted(gating.targets, reverse=True):
            raise RecipeError(
                f"targets={gating.targets}: all parts of an undivided region are undivided, so that the share cannot "
                "grow with the size; give falling numbers"
            )
        if len(self.grids) == 1:
            self._two_scales(gating)
        else:
            self._quadtree(gating, loaders)

    @property
    def rate(self) -> float:
        return self.rates[0]

    def _two_scales(self, gating: GatingSettings):
        n = math.prod(self.grid)
        self.shares = self.model.macs_of(torch.arange(n + 1), self.size) / self.dense
        rates, shares = np.linspace(0, 1, n + 1), self.shares.numpy()
        if gating.targets:
            self.rates = list(gating.targets)
        elif gating.budget == "macs":
            self.check("target", gating.target)
            self.rates = [float(np.interp(gating.target, shares[::-1], rates[::-1]))]
        self.macs = float(np.interp(self.rate, rates, shares))

    def _quadtree(self, gating: GatingSettings, loaders: Loaders | None):
        if gating.targets:
            self.rates = list(gating.targets)
        elif gating.budget == "coarse":
            raise RecipeError(
                f"budget='coarse' with scales={self.model.scales}: one share says nothing of the larger regions; say "
                "targets, one share for each size, or budget='macs'"
            )
        else:
            self.check("target", gating.target)
            splits = self._splits_by_detail(loaders) if loaders and gating.learned else self._even_splits()
            self.rates = nearest_to_budget(splits, self._share, gating.target)
        self.macs = self._share(self.rates)

    def check(self, name: str, share: float):
        """Raise unless some decisions cost this share of dense MACs."""
        most, least = (self._share([rate] * len(self.grids)) for rate in (0.0, 1.0))
        if not least < share < most:
            raise RecipeError(
                f"{name}={share:g} cannot be met: this model's share of dense MACs is {least:.3f} with all regions "
                f"coarse and {most:.3f} with all fine; choose one between, or another scale"
            )

    def _share(self, rates: list[float]) -> float:
        """Return the share of dense MACs at so many undivided regions."""
        counts = [torch.tensor([rate * math.prod(grid)]) for rate, grid in zip(rates, self.grids, strict=True)]
        return self.model.macs_of(counts, self.size).item() / self.dense

    def _even_splits(self) -> list[list[float]]:
        """Return rates with equal shares of those that are asked, from all coarse to all fine."""
        divided = [(k / 1000) for k in range(1001)]
        return [[1 - q**n for n in range(len(self.grids), 0, -1)] for q in divided]

    def _splits_by_detail(self, loaders: Loaders) -> list[list[float]]:
        """Return rates at falling bounds on what is thrown away, from all coarse to all fine."""
        seen = []
        for batch in loaders.first_pictures():
            lost = [detail(batch.images, self.model, loaders, i).view(-1, *grid) for i, grid in enumerate(self.grids)]
            seen.append(nested([-d for d in lost]))
        levels = [torch.cat(level).flatten().sort().values for level in zip(*seen, strict=True)]
        ends = torch.tensor([-torch.inf, torch.inf])
        bounds = torch.cat([ends[:1], torch.cat(levels).unique()[:: max(1, len(levels[0]) // 500)], ends[1:]])
        above = [1 - torch.searchsorted(level, bounds, right=True) / len(level) for level in levels]
        return torch.stack(above, 1).clamp(0.01, 0.99).tolist()  # what a loss can be asked for


def choose_gate(model: MSViT, recipe: Recipe, loaders: Loaders) -> Budget:
    """Put a rule in the gate's place if the recipe says so; hold it, or a quota, to the budget as far as can be."""
    gating = recipe.gating if recipe.training.epochs else None
    if gating is None or gating.learned or gating.by == "oracle":
        budget = Budget(model, loaders.size, gating, loaders)
        if gating is not None and isinstance(model.gate, Quota):
            model.gate.rate = int((budget.shares - budget.macs).abs().argmin()) / math.prod(budget.grid)
        return budget
    device = model.cut.device
    model.gate = make_rule("fine")  # costs what every rule costs, nothing
    budget = Budget(model, loaders.size, gating)
    rate = budget.rates[-1]  # of the regions of each size, whatever the larger ones are
    settings = {
        "centre": {"rate": rate},
        "border": {"rate": rate},
        "random": {"rate": rate, "seed": recipe.training.seed},
    }
    for bounded, thresholds in THRESHOLDS.items():
        own = {"thresholds": list(thresholds[: len(budget.grids)]), "mean": loaders.mean, "std": loaders.std}
        settings[bounded] = own | gating.rule_settings
    name = "entropy" if gating.by == "apt" else gating.by
    try:
        rule = make_rule(name, **settings.get(name, {})).to(device)
        checked_scales(model.scales, rule.sizes)
        model.gate = rule
        if rule.adjustable and gating.calibrate:  # otherwise it keeps its own thresholds
            model.calibrate(loaders.first_pictures(), budget.macs)
    except (ValueError, TypeError) as error:
        raise RecipeError(str(error)) from error
    return budget
