"""Decisions without learning: rules that stand where a gate stands, and masks to run a model with.

A rule is a module that MSViT takes as its gate, `MSViT(vit, gate=msvit.make_rule("centre", rate=0.6))`. It scores
each coarse region of a picture with a number in [0, 1], and the model makes coarse what exceeds its threshold.
"""

import math
from functools import partial
from typing import NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ..checks import in_interval, known_settings, one_of
from ..core.tokens import patchify


class Scores(NamedTuple):
    """Soft decisions in [0, 1], 1 = coarse, `[B, h, w]`; for blocks of 2 x 2 regions `[B, h // 2, w // 2]`, or None."""

    regions: Tensor
    blocks: Tensor | None = None


class Rule(nn.Module):
    """A module that scores pictures `[B, c, H, W]` with h x w coarse regions. It learns nothing.

    Attributes:
        adjustable: Whether a threshold on its scores means something, so that a budget can be calibrated.
    """

    adjustable: bool = False

    def score(self, images: Tensor, grid: tuple[int, int]) -> Scores:
        raise NotImplementedError


class Static(Rule):
    """The same share of coarse regions in every picture, at places that do not depend on what is in it.

    Kinds: "fine" and "coarse" (all regions), "centre" (fine in the middle), "border" (fine at the border),
    "checkerboard", and "random": new places in every training step, and in evaluation places that follow from the
    picture's pixels and the seed, so that a picture has the same ones whenever it is seen.

    Args:
        rate: Share of coarse regions, for the kinds that leave it open: centre, border and random.
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

    def score(self, images: Tensor, grid: tuple[int, int]) -> Scores:
        b, (h, w), device = len(images), grid, images.device
        y, x = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
        if self.kind == "random":
            order = torch.rand(b, h * w, device=device) if self.training else shuffled(images, h * w, self.seed)
        elif self.kind == "checkerboard":
            order = ((y + x) % 2).flatten().expand(b, -1)
        else:
            # Squared distance to the centre of the picture, in half regions.
            distance = (2 * y + 1 - h).square() + (2 * x + 1 - w).square()
            order = (distance if self.kind == "border" else -distance).flatten().expand(b, -1)
        count = math.floor(self.rate * h * w + 0.5)
        first = order.sort(dim=1, stable=True).indices[:, :count]
        return Scores(torch.zeros(b, h * w, device=device).scatter(1, first, 1.0).view(b, h, w))

    def extra_repr(self) -> str:
        return f"{self.kind}, rate={self.rate:g}"


class Entropy(Rule):
    """Coarse where a patch says little (Choudhury et al. 2025, APT): its grey values' entropy is below a threshold.

        H = - sum_i p_i log2 p_i,    p the histogram of 256 grey values,    score = sigmoid(bits - H)

    With three scales, a block of 2 x 2 regions becomes one token where the block's own entropy is below `bits - gap`,
    as APT decides from the largest patch to the smallest.

    Args:
        bits: The threshold, in [0, 8]; 0 makes every region fine. The model's threshold shifts it further.
        scales: 2 (fine, coarse) or 3 (blocks too).
        gap: How many bits less a block may have.
        mean, std: Of the pictures' normalisation, to have grey values again.
    """

    adjustable = True

    def __init__(
        self,
        bits: float = 5.0,
        scales: int = 2,
        gap: float = 1.0,
        mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
        std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__()
        in_interval("bits", bits, "[0, 8]")
        if scales not in (2, 3):
            raise ValueError(f"scales={scales}: use 2 (fine and coarse) or 3 (blocks of coarse ones too)")
        self.bits, self.scales, self.gap = bits, scales, gap
        self.mean, self.std = tuple(mean), tuple(std)

    def score(self, images: Tensor, grid: tuple[int, int]) -> Scores:
        counts = self.histograms(images, grid)
        regions = torch.sigmoid(self.bits - entropy(counts))
        if self.scales == 2:
            return Scores(regions)
        h, w = grid[0] // 2, grid[1] // 2
        blocks = counts[:, : 2 * h, : 2 * w].unflatten(2, (w, 2)).unflatten(1, (h, 2)).sum((2, 4))
        return Scores(regions, torch.sigmoid(self.bits - self.gap - entropy(blocks)))

    def histograms(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return how many pixels of each region have each of 256 grey values, `[B, h, w, 256]`."""
        if len(self.mean) != images.shape[1]:
            raise ValueError(f"mean={self.mean} for pictures of {images.shape[1]} channels; give one number for each")
        shares = (0.299, 0.587, 0.114) if len(self.mean) == 3 else [1 / len(self.mean)] * len(self.mean)
        values = images * images.new_tensor(self.std)[:, None, None] + images.new_tensor(self.mean)[:, None, None]
        grey = torch.einsum("bchw,c->bhw", values.float(), images.new_tensor(shares).float())[:, None]
        levels = (grey * 255).round().clamp(0, 255).long()
        cells = patchify(levels, images.shape[-1] // grid[1]).flatten(0, 1)
        cells = cells + 256 * torch.arange(len(cells), device=cells.device)[:, None]
        return torch.bincount(cells.flatten(), minlength=256 * len(cells)).view(len(images), *grid, 256)

    def extra_repr(self) -> str:
        return f"bits={self.bits:g}, scales={self.scales}"


def entropy(counts: Tensor) -> Tensor:
    """Return the entropy - sum_i p_i log2 p_i over the last dimension, from counts."""
    p = counts.double() / counts.sum(-1, keepdim=True)
    return -(p * p.clamp(min=1e-30).log2()).sum(-1).float()


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


RULES = {"entropy": Entropy, **{kind: partial(Static, kind) for kind in Static.KINDS}}


def make_rule(name: str, **settings) -> Rule:
    """Return a rule by its name in `RULES`; the settings are the class's own, as JSON has them."""
    make = RULES[one_of("rule", name, RULES)]
    rule = make(**known_settings(name, settings, make))
    rule.settings = {"name": name, **settings}
    return rule
