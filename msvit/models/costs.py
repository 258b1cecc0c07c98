"""What a model costs: MACs in closed form, from how many regions of each size are one token."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.macs import encoder_macs, gate_macs, token_counts
from ..core.scales import asked
from ..gating.base import Rule
from .coarse import FullResolution


class Costs:
    """The MACs of a model with a backbone, scales, a gate, a head, and what else it may have.

    Each undivided region has one token in the place of those that its parts would have, so that a picture has

        n = n_fine - sum_d (k_d² - 1) u_d

    patch tokens, where u_d counts the regions of size d that lie within one token, and k_d is how many of the size
    before are along the side of one of them: the first scale, and 2 from there on.
    """

    vit: nn.Module
    scales: tuple[int, ...]
    gate: nn.Module
    head: nn.Module
    reducer: nn.Module | None
    coarse_embed: nn.Module | None

    def macs_of(self, coarse: Tensor | Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the MACs, float64 `[B]`, of pictures with so many coarse regions, gate and reducer included.

        Args:
            coarse: How many; with more than two scales a list of how many regions of each size, from small to large,
                lie within one token, their own or a larger one.
            size: Of the pictures in pixels.
        """
        counts = [coarse] if isinstance(coarse, Tensor) else list(coarse)
        fewer = sum((ratio**2 - 1) * n for ratio, n in zip(self._ratios(), counts, strict=True))
        patches = math.prod(self.grid(size)) * self.scale**2 - fewer
        return self._macs(self.vit.num_prefix_tokens + patches, counts, size, gated=True)

    def _ratios(self) -> tuple[int, ...]:
        return (self.scales[1], *(2 for _ in self.scales[2:]))

    def path_macs(self, *coarse: Tensor | int) -> Tensor | int:
        """Return the MACs of APT's path by counts as in `macs_of`; 0 without that path."""
        if not isinstance(self.coarse_embed, FullResolution):
            return 0
        inside = (*(4 * n for n in coarse[1:]), 0)
        sides = self.scales[1 : len(coarse) + 1]
        return sum(
            (n - more) * self.coarse_embed.macs(self.vit, s) for s, n, more in zip(sides, coarse, inside, strict=True)
        )

    def gate_macs(self, coarse: Sequence[Tensor | int], size: tuple[int, int]) -> Tensor | int:
        """Return the MACs of the gates, each on the regions that it is asked about, by counts as in `macs_of`."""
        if isinstance(self.gate, Rule):
            return 0
        regions = asked(self.grids(size), coarse)
        return sum(gate_macs(gate, n) for gate, n in zip(self.gate.levels, regions, strict=True))

    def dense_macs(self, size: tuple[int, int]) -> int:
        """Return the MACs of backbone and head on a picture with all tokens fine, without gate and reducer."""
        patches = math.prod(self.grid(size)) * self.scale**2
        tokens = torch.tensor([self.vit.num_prefix_tokens + patches])
        counts = token_counts(len(self.vit.blocks), tokens)
        return int(encoder_macs(self.vit, tokens, counts) + self.head.macs(self.vit, counts[-1, 1], patches))

    def _macs(
        self, tokens: Tensor, coarse: list[Tensor], size: tuple[int, int], gated: bool, counts: Tensor | None = None
    ) -> Tensor:
        """Return MACs by the tokens that enter and what each block saw, which follows in closed form if not given."""
        if counts is None:
            counts = token_counts(len(self.vit.blocks), tokens, self.reducer)
        macs = encoder_macs(self.vit, tokens.long(), counts, self.reducer)
        macs = macs + self.head.macs(self.vit, counts[-1, 1], math.prod(self.grid(size)) * self.scale**2)
        return (macs + self.path_macs(*coarse) + (self.gate_macs(coarse, size) if gated else 0)).double()
