"""Baselines without a predictor: the most significant tokens, random ones, and averages over a grid."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.tokens import Tokens
from .base import Keeping, Reducer, merge


class PowerBert(Keeping):
    """Keeps what receives most attention, Sig_j = sum over heads, i of A_ij (PoWER-BERT, Goyal et al. 2020)."""

    lossless = False
    needs = "received"

    def reduce(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        return self.top(layer, tokens, seen)


class RandomPruning(Keeping):
    """Keeps random tokens, new ones in every training step; in evaluation the same places in every picture.

    Args:
        seed: Of the places in evaluation.
    """

    lossless = False

    def __init__(
        self, vit: nn.Module, keep: float | Sequence[float] = 0.7, layers: Sequence[int] | None = None, seed: int = 0
    ):
        super().__init__(vit, keep, layers)
        self.seed = seed

    def reduce(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        position = tokens.layout.position
        if self.training:
            scores = torch.rand(len(position), device=position.device)
        else:
            generator = torch.Generator().manual_seed(self.seed * 1000 + layer)
            scores = torch.rand(max(tokens.layout.lengths), generator=generator).to(position.device)[position]
        return self.top(layer, tokens, scores)


class GridPooling(Reducer):
    """Strided average: the tokens under each stride x stride cell of the fine grid become their mean.

    At its n-th layer the cells are stride^n wide. A token that is wider than a cell already, such as a coarse one,
    stays as it is. By default it acts once, at half the depth.
    """

    adaptive = True

    def __init__(self, vit: nn.Module, stride: int = 2, layers: Sequence[int] | None = None):
        super().__init__(vit, [len(vit.blocks) // 2] if layers is None else layers)
        if not isinstance(stride, int) or stride < 1:
            raise ValueError(f"stride={stride!r}: a cell is a whole number of fine patches wide; use 1, 2, 3 …")
        self.stride = stride

    def reduce(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        if self.stride == 1:
            return tokens
        side = self.stride ** (self.layers.index(layer) + 1)
        (b, h, w), device = tokens.where.shape, tokens.where.device
        place = torch.arange(h * w, device=device).expand(b, -1).flatten()
        # The first fine patch under a token says which cell it is in; tokens with none are never merged.
        rows, covered = tokens.where.flatten(), tokens.where.flatten() >= 0
        first = torch.full((len(tokens.x),), h * w, device=device)
        first = first.scatter_reduce(0, rows[covered], place[covered], "amin")
        cell = first // w // side * w + first % w // side
        alone = -1 - tokens.layout.position
        key = tokens.layout.picture * (h * w + len(tokens.x)) + cell.where(first < h * w, alone) + len(tokens.x)
        _, group = key.unique(return_inverse=True)
        leader = torch.full((int(group.max()) + 1,), len(key), device=device)
        leader = leader.scatter_reduce(0, group, torch.arange(len(key), device=device), "amin")
        # New rows in the order of the first token of each: prefix tokens first, then as the picture has them.
        number = torch.empty_like(leader)
        number[leader.argsort()] = torch.arange(len(leader), device=device)
        counts = torch.bincount(tokens.layout.picture[leader], minlength=b).tolist()
        return merge(tokens, number[group], counts, weight=tokens.area.clamp(min=1))
