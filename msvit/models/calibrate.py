"""Budgets met afterwards: the threshold, or any other setting, that gives a model the MACs that it is allowed."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import inside
from ..gating.base import Rule
from ..gating.learned import Quota


def nearest_to_budget(candidates: Sequence[Any], cost: Callable[[Any], float], budget: float) -> Any:
    """Return the first of the candidates whose cost is nearest to a budget; costs must not fall along the candidates.

    By bisection: `cost` is asked of a few candidates only.
    """

    @cache
    def price(i: int) -> float:
        return cost(candidates[i])

    everything = range(len(candidates))
    best = bisect_left(everything, budget, key=price)
    if best == len(candidates) or (best and budget - price(best - 1) <= price(best) - budget):
        best = bisect_left(everything, price(best - 1), key=price)
    return candidates[best]


def thresholds(soft: Tensor) -> Tensor:
    """Return one threshold for each way to cut soft values, from 0 (all coarse) to 1 (all fine)."""
    levels = soft.unique()
    return torch.cat([levels.new_zeros(1), (levels[1:] + levels[:-1]) / 2, levels.new_ones(1)])


@torch.no_grad()
def calibrate(model: nn.Module, loader, macs: float) -> float:
    """Set `model.threshold`, or a quota's rate, so that the mean MACs over a loader come nearest to a share of dense.

    Returns:
        The share that is reached.
    """
    if not inside(macs, "(0, 1.1]"):
        raise ValueError(f"macs={macs}: a share of the dense model's MACs, such as 0.6")
    if isinstance(model.gate, Rule) and not model.gate.adjustable:
        raise ValueError(f"{model.gate} has no threshold to calibrate; choose its rate, with macs_of for the budget")
    knob = model.gate.parts if isinstance(model.gate, Quota) else model.cut
    before = knob.clone()
    with model.evaluating():
        try:
            pictures = _Pictures(model, loader, knob)
            best = nearest_to_budget(pictures.choices(), pictures.share, macs)
            share = pictures.share(best)
            before = best
        finally:
            knob.copy_(before)
    return share


class _Pictures:
    """What a gate says of a loader's pictures, and the share of dense MACs that a turn of its knob would give them.

    The knob is the model's threshold, or the rate of a quota.
    """

    def __init__(self, model: nn.Module, loader, knob: Tensor):
        self.model, self.size, self.knob = model, None, knob
        self.images, soft, device = [], [], model.cut.device
        for batch in loader:
            images = (batch if isinstance(batch, Tensor) else batch[0]).to(device)
            model.check(images)
            if self.size not in (None, images.shape[-2:]):
                raise ValueError(
                    f"pictures of {tuple(self.size)} and {tuple(images.shape[-2:])} px; calibrate on one size"
                )
            self.size = images.shape[-2:]
            soft.append(model.decide(images, everywhere=True).nested)
            self.images += [images.cpu()] if model.adaptive else []
        if not soft:
            raise ValueError("the loader is empty; calibrate on some pictures")
        self.soft = [torch.cat(level) for level in zip(*soft, strict=True)]
        self.dense = model.dense_macs(self.size)

    def choices(self) -> Tensor:
        """Return all that the knob can be turned to and makes a difference, from all coarse to all fine."""
        gate = self.model.gate
        if isinstance(gate, Quota):
            return gate.parts_of(self.soft[0][0].numel())
        return thresholds(torch.cat([level.flatten() for level in self.soft]))

    def share(self, choice: Tensor) -> float:
        """Return the mean, in closed form where there is one; otherwise the whole model runs."""
        self.knob.copy_(choice)
        if self.model.adaptive:
            macs = [self.model.run(images.to(self.knob.device)).macs for images in self.images]
            return torch.cat(macs).mean().item() / self.dense
        if isinstance(self.model.gate, Quota):
            count = self.model.gate.count(self.soft[0][0].numel())[None]
            return self.model.macs_of(count, self.size).item() / self.dense
        coarse = [level > choice for level in self.soft]
        return self.model.macs_of(coarse, self.size).mean().item() / self.dense
