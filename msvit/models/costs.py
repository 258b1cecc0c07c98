"""What a model costs: MACs in closed form, from how many regions of each size are one token."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.macs import encoder_macs, gate_macs, token_counts
from ..core.scales import asked
from ..gating.base import Rule
from .coarse import FullResolution
from .tokenizer import Gating


class Costs:
    """The MACs of a model with a backbone, scales, a gate, a head, and what else it may have.

    Each undivided region has one token in the place of those that its parts would have, so that a picture has

        n = n_fine - sum_d (k_d² - 1) u_d

    patch tokens, where u_d counts the regions of size d that lie within one token, and k_d is how many of the size
    before are along the side of one of them: the first scale, and 2 from there on. A coarse region at the border of a
    picture stands for the fine patches inside alone, fewer than k_1².
    """

    vit: nn.Module
    scales: tuple[int, ...]
    gate: nn.Module
    head: nn.Module
    reducer: nn.Module | None
    coarse_embed: nn.Module | None

    def macs_of(self, coarse: Tensor | Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the MACs, float64 `[B]`, of pictures with these coarse regions, gate and reducer included.

        Args:
            coarse: How many, `[B]`, or which, bool `[B, h, w]`; where some lie partly outside, the mean over which is
                given. With more than two scales a list with the same of the regions of each size, from small to large,
                that lie within one token, their own or a larger one.
            size: Of the pictures in pixels.
        """
        levels = [coarse] if isinstance(coarse, Tensor) else list(coarse)
        if len(levels) != len(self.scales) - 1:
            raise ValueError(f"regions of {len(levels)} sizes for scales={self.scales}; give {len(self.scales) - 1}")
        counts = [level if level.dim() == 1 else level.sum((1, 2)) for level in levels]
        patches = math.prod(self.patches(size)) - self._saved(levels[0], size) - 3 * sum(counts[1:])
        return self._macs(self.vit.num_prefix_tokens + patches, counts, size, gated=True)

    def _saved(self, coarse: Tensor, size: tuple[int, int]) -> Tensor:
        """Return how many tokens fewer there are, `[B]`, for so many or these of the smallest regions."""
        regions, fine = math.prod(self.grid(size)), math.prod(self.patches(size))
        if coarse.dim() == 1:
            return coarse * (fine - regions) / regions
        sides = zip(self.grid(size), self.patches(size), strict=True)
        under = torch.outer(*((n - self.scale * torch.arange(h)).clamp(max=self.scale) for h, n in sides))
        return (coarse * (under.to(coarse.device) - 1)).sum((1, 2))

    def spent(
        self, gating: Gating, size: tuple[int, int], entering: Tensor, counts: Tensor, gated: bool = True
    ) -> Tensor:
        """Return the MACs, float64 `[B]`, of pictures of one size, by the tokens that entered and each block saw."""
        coarse = [(u.detach() > 0.5).sum((1, 2)) for u in gating.undivided]
        return self._macs(entering, coarse, size, gated, counts)

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
        """Return the MACs of the gates, each on the regions that it looks at, by counts as in `macs_of`."""
        if isinstance(self.gate, Rule):
            return 0
        grids = self.grids(size)
        each = zip(self.gate.levels, grids, asked(grids, coarse), strict=True)
        return sum(gate_macs(gate, n if gate.alone else math.prod(grid)) for gate, grid, n in each)

    def dense_macs(self, size: tuple[int, int]) -> int:
        """Return the MACs of backbone and head on a picture with all tokens fine, without gate and reducer."""
        patches = math.prod(self.patches(size))
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
        macs = macs + self.head.macs(self.vit, counts[-1, 1], math.prod(self.patches(size)))
        return (macs + self.path_macs(*coarse) + (self.gate_macs(coarse, size) if gated else 0)).double()
