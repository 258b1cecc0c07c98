"""APT's decisions: coarse where the grey values of a patch say little."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ..checks import one_of
from ..core.tokens import patchify
from .base import ThresholdRule


class Bins(NamedTuple):
    """How many bins grey values have, how far apart the bins of black and white are, and the weights of red … blue."""

    count: int
    span: float
    weights: tuple[float, float, float] = (0.2989, 0.5870, 0.1140)


BINS = {
    "loader": Bins(512, 512.0),
    "batched": Bins(512, 510.0),
    "rounded": Bins(256, 255.0, (0.299, 0.587, 0.114)),
}
INCOMPLETE = 1e6  # bits of a patch that ends outside of the picture: it is never coarse


class Entropy(ThresholdRule):
    """Coarse where a patch says little (Choudhury et al. 2025, APT): its grey values' entropy is below a threshold.

        H = - sum_b p_b log2(p_b + 1e-10),    p the histogram of 512 bins of 0.2989 R + 0.5870 G + 0.1140 B

    Each size has a threshold t in bits of its own, and a patch is chosen where H < t and no larger patch that covers it
    is. As a score for the model's threshold, 1/2 unless a budget moves all sizes' thresholds together:

        score = sigmoid(t - H) > 1/2   exactly where   H < t

    Args:
        thresholds: For coarse patches, and for each size above them with more than two scales: up to three, in [0, 9].
        bins: Which of the publication's two functions puts grey values in bins, the one that trains and evaluates
            ("loader": min(floor(512 g / 255), 511) of pictures of 8 bits) or "batched": min(floor(2 g), 511).
            "rounded" is how it was here until version 0.1: 256 whole grey values.
        mean, std: Of the pictures' normalisation, to have grey values again.
    """

    interval = "[0, 9]"

    def __init__(
        self,
        thresholds: Sequence[float] = (5.5,),
        bins: str = "loader",
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__(thresholds, mean, std)
        self.bins = one_of("bins", bins, BINS)

    def score(self, images: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
        pictures = self.pixels(images)
        levels, scores = grey_bins(pictures, self.bins), []
        for i, (threshold, (h, w)) in enumerate(zip(self.thresholds, grids, strict=True)):
            bits = patch_entropy(levels, images.shape[-1] // grids[0][1] * 2**i, BINS[self.bins].count)
            scores.append(torch.sigmoid(threshold - bits)[:, :h, :w].to(pictures.dtype))
        return scores

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bins={self.bins}"


def grey_bins(pictures: Tensor, bins: str) -> Tensor:
    """Return the bin of each pixel's grey value, int64 `[B, H, W]`, of pictures `[B, c, H, W]` from 0 to 1.

    Pictures of one channel, or others than three, are grey in equal parts.
    """
    count, span, weights = BINS[bins]
    if bins != "rounded":
        pictures = pictures.clamp(0, 1)
    if bins == "loader":  # which sees pictures of 8 bits; normalising and back has moved them a little
        pictures = (255 * pictures).round() / 255
    channels = pictures.shape[1]
    weights = pictures.new_tensor(weights if channels == 3 else [1 / channels] * channels)
    places = (pictures * weights[:, None, None]).sum(1) * span
    return (places.round() if bins == "rounded" else places.floor()).clamp(0, count - 1).long()


def patch_entropy(levels: Tensor, patch: int, count: int) -> Tensor:
    """Return the entropy in bits, float64 `[B, h, w]`, of patches of `patch` pixels, from bins `[B, H, W]` of `count`.

    Patches tile a picture from its upper left corner. What sticks out counts as black; where it does, the last row or
    column has INCOMPLETE bits.
    """
    bottom, right = (-side % patch for side in levels.shape[-2:])
    padded = F.pad(levels, (0, right, 0, bottom))
    cells = patchify(padded[:, None], patch).flatten(0, 1)
    cells = cells + count * torch.arange(len(cells), device=cells.device)[:, None]
    p = torch.bincount(cells.flatten(), minlength=count * len(cells)).view(-1, count).double() / patch**2
    bits = -(p * (p + 1e-10).log2()).sum(1).view(len(levels), *(side // patch for side in padded.shape[-2:]))
    if bottom:
        bits[:, -1] = INCOMPLETE
    if right:
        bits[:, :, -1] = INCOMPLETE
    return bits


def earlier_settings(bits: float = 5.0, scales: int = 2, gap: float = 1.0, **rest: Any) -> dict[str, Any]:
    """Return today's settings of a rule as it was saved until version 0.1, in bits and a gap, on 256 grey values."""
    return rest | {"thresholds": [bits, max(bits - gap, 0.0)][: scales - 1], "bins": "rounded"}
