"""What stands where a gate stands: a rule, and what it says of pictures."""

from typing import NamedTuple

from torch import Tensor, nn


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
