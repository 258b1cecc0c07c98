"""Decisions without learning: rules that stand where a gate stands, and masks to run a model with.

A rule is a module that MSViT takes as its gate, `MSViT(vit, gate=msvit.make_rule("centre", rate=0.6))`. It scores
each region of a picture with a number in [0, 1], and the model makes one token of what exceeds its threshold.
"""

import inspect
import math
from functools import partial

import torch
from torch import Tensor

from ..checks import in_interval, known_settings, one_of
from .base import Rule
from .entropy import Entropy
from .pixels import PSNR, Equality


class Static(Rule):
    """The same share of coarse regions in every picture, at places that do not depend on what is in it.

    Kinds: "fine" and "coarse" (all regions), "centre" (fine in the middle), "border" (fine at the border),
    "checkerboard", and "random": new places in every training step, and in evaluation places that follow from the
    picture's pixels and the seed, so that a picture has the same ones whenever it is seen.

    Args:
        rate: Share of coarse regions, for the kinds that leave it open: centre, border and random. With more than two
            scales, of the regions of each size, whatever the larger ones around them are.
        seed: Of random places.
    """

    KINDS = ("fine", "coarse", "centre", "border", "checkerboard", "random")

    def __init__(self, kind: str, rate: float | None = None, seed: int = 0):
        super().__init__()
        one_of("static mask", kind, self.KINDS)
        fixed = {"fine": 0.0, "coarse": 1.0, "checkerboard": 0.5}.get(kind)
        if fixed is not None and rate not in (None, fixed):
            raise ValueError(f"rate={rate}: a {kind} mask has the rate {fixed:g}; use centre, border or random")
        rate = fixed if fixed is not None else 0.5 if rate is None else rate
        in_interval("rate", rate, "[0, 1]")
        self.kind, self.rate, self.seed = kind, rate, seed

    def score(self, images: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
        return [self._mask(images, grid, self.seed + 7919 * level) for level, grid in enumerate(grids)]

    def _mask(self, images: Tensor, grid: tuple[int, int], seed: int) -> Tensor:
        """Return 1 for the coarse regions of one size, `[B, h, w]`."""
        b, (h, w), device = len(images), grid, images.device
        y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
        if self.kind == "random":
            order = torch.rand(b, h * w, device=device) if self.training else shuffled(images, h * w, seed)
        elif self.kind == "checkerboard":
            order = ((y + x) % 2).flatten().expand(b, -1)
        else:
            distance = from_centre(grid, device)
            order = (distance if self.kind == "border" else -distance).flatten().expand(b, -1)
        count = math.floor(self.rate * h * w + 0.5)
        first = order.sort(dim=1, stable=True).indices[:, :count]
        return torch.zeros(b, h * w, device=device).scatter(1, first, 1.0).view(b, h, w)

    def extra_repr(self) -> str:
        return f"{self.kind}, rate={self.rate:g}"


def from_centre(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Return the squared distance of regions to the centre of the picture, in half regions, `[h, w]`."""
    y, x = torch.meshgrid(*(torch.arange(1 - n, n, 2, device=device) for n in grid), indexing="ij")
    return y.square() + x.square()


def shuffled(images: Tensor, n: int, seed: int) -> Tensor:
    """Return n pseudo-random whole numbers per picture, `[B, n]`, from its pixels alone, the same on every device."""
    bits = images.detach().float().contiguous().view(torch.int32).flatten(1).long()
    place = torch.arange(bits.shape[1], device=bits.device)
    key = ((bits ^ place) * 2654435761).sum(1)[:, None] + seed * 40503
    return _mix(_mix(key) + torch.arange(n, device=bits.device))


def _mix(x: Tensor) -> Tensor:
    """Scatter neighbours by a bijection of int64: multiplications by odd numbers, which wrap, and shifts."""
    for factor in (-4658895280553007687, -7723592293110705685):  # odd, with bits as if tossed
        x = (x ^ (x >> 29)) * factor
    return x ^ (x >> 32)


RULES = {
    "entropy": Entropy,
    "psnr": PSNR,
    "equality": Equality,
    **{kind: partial(Static, kind) for kind in Static.KINDS},
}


def make_rule(name: str, **settings) -> Rule:
    """Return a rule by its name in `RULES`; the settings are the class's own, as JSON has them.

    It keeps all of them as `settings`, defaults too, so that a saved rule stays what it is.
    """
    make = RULES[one_of("rule", name, RULES)]
    rule = make(**known_settings(name, settings, make))
    defaults = {key: parameter.default for key, parameter in inspect.signature(make).parameters.items()}
    rule.settings = {"name": name, **(defaults | settings)}
    return rule
