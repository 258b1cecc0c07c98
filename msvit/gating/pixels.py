"""Rules on pixels: coarse where a lower resolution is good enough, or where neighbouring patches are the same."""

from collections.abc import Sequence

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ..core.scales import enlarge
from ..core.tokens import patchify, shrink
from .base import ThresholdRule


class PixelRule(ThresholdRule):
    """A rule that scores the regions of each size by their own pixels alone."""

    def score(self, images: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
        pictures, scores = self.pixels(images), []
        for i, (threshold, (h, w)) in enumerate(zip(self.thresholds, grids, strict=True)):
            side = images.shape[-1] // grids[0][1] * 2**i
            whole = pictures[..., : h * side, : w * side]
            scores.append(self.soft(whole, side, 2 ** (i + 1), threshold).view(len(images), h, w))
        return scores

    def soft(self, pictures: Tensor, side: int, scale: int, threshold: float) -> Tensor:
        """Return scores `[B, hw]` of regions of `side` pixels, whose token has 1 / scale of the resolution."""
        raise NotImplementedError


class PSNR(PixelRule):
    """Coarse where a region can be had again from half of the resolution, a larger one from a quarter or an eighth.

        PSNR = -10 log10 mean (x - enlarge(average(x)))²   of pixels from 0 to 1,   score = sigmoid((PSNR - t) / 10)

    Averages are over 2 x 2 pixels for coarse patches, and over twice as many a side for each size above. The score
    exceeds 1/2 exactly where PSNR > t.

    Args:
        thresholds: t in decibels, for each size of regions.
        mean, std: As in `ThresholdRule`.
    """

    def __init__(
        self,
        thresholds: Sequence[float] = (30.0,),
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__(thresholds, mean, std)

    def soft(self, pictures: Tensor, side: int, scale: int, threshold: float) -> Tensor:
        lost = patchify((pictures - enlarge(shrink(pictures, scale), scale)).square(), side).mean(-1)
        return torch.sigmoid((-10 * lost.clamp(min=1e-12).log10() - threshold) / 10)


class Equality(PixelRule):
    """Coarse where all neighbouring quarters of a region are the same pixel by pixel, as on pages and screens.

        d = max |x_p - x_q| over neighbours p, q and their pixels, in grey levels,   score = sigmoid(t + 1/2 - d)

    The score exceeds 1/2 exactly where d ≤ t, whole levels. It is the redundancy that PixelPrune removes, exact or
    within a tolerance, as a decision about regions: so their tokens keep their places, and nothing is dropped.

    Args:
        thresholds: t in levels of 256, for each size of regions; 0 asks for exact equality.
        mean, std: As in `ThresholdRule`.
    """

    interval = "[0, 255]"

    def __init__(
        self,
        thresholds: Sequence[float] = (0.0,),
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
    ):
        super().__init__(thresholds, mean, std)

    def soft(self, pictures: Tensor, side: int, scale: int, threshold: float) -> Tensor:
        levels = (255 * pictures).round()  # normalising and back has moved them a little
        b, c = levels.shape[:2]
        half = side // 2
        quarters = patchify(levels, side).view(b, -1, c, 2, half, 2, half)
        across = (quarters[..., 0, :] - quarters[..., 1, :]).abs().amax((2, 3, 4, 5))
        down = (quarters[:, :, :, 0] - quarters[:, :, :, 1]).abs().amax((2, 3, 4, 5))
        return torch.sigmoid(threshold + 0.5 - across.maximum(down))
