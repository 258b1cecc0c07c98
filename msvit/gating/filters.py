"""Filters: a cheap way for a gate to see the detail of a region."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


class FilterBank(nn.Linear):
    """How much small filters find in a region: of each filter k the mean of its answers over the region's n cells.

        phi_k = 1/n sum_j GELU(w_k . x_j + b_k),    x_j the pixels of cell j

    Cells tile the region, 4 x 4 pixels each or about, so that a pattern counts wherever in the region it is: what is
    asked is how much fine detail there is and of which kind, not where. That is cheap: a MAC for each filter and value
    of a pixel, where an MLP on all pixels has as many as its first layer is wide.

    Args:
        patch: Side of a region in pixels.
        channels: Channels of the pictures.
        filters: How many.
    """

    def __init__(self, patch: int, channels: int = 3, filters: int = 8):
        sides = (side for side in range(2, patch + 1) if patch % side == 0)
        cell = min(sides, key=lambda side: abs(math.log(side / 4)))
        super().__init__(channels * cell**2, filters)
        self.cell, self.side, self.channels = cell, patch // cell, channels

    @property
    def rows(self) -> int:
        """The cells of one region, each of which goes through the layer."""
        return self.side**2

    def forward(self, regions: Tensor) -> Tensor:
        """Return phi `[..., K]` of the pixels of regions `[..., c S S]`."""
        cut = regions.unflatten(-1, (self.channels, self.side, self.cell, self.side, self.cell))
        cells = cut.movedim((-4, -2), (-5, -4)).flatten(-3).flatten(-3, -2)
        return F.gelu(super().forward(cells)).mean(-2)

    def extra_repr(self) -> str:
        return f"{self.out_features} filters of {self.cell} x {self.cell} px on {self.rows} cells"
