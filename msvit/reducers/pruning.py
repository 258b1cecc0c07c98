"""Baselines without a predictor: the most significant tokens, random ones, averages and convolutions over a grid.

Token Pooling (Marin et al. 2021) is compared with them there.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..core.tokens import Tokens
from .base import Keeping, Reducer, merge


class PowerBert(Keeping):
    """Keeps what receives most attention, Sig_j = sum over heads, i of A_ij (PoWER-BERT, Goyal et al. 2020).

    Args:
        keep: As a share of the patch tokens that are there, for all layers or one for each.
        tokens: How many at each layer, in place of `keep`; a picture with fewer patch tokens keeps them all.
    """

    lossless = False
    needs = "received"

    def __init__(
        self,
        vit: nn.Module,
        keep: float | Sequence[float] = 0.7,
        layers: Sequence[int] | None = None,
        tokens: Sequence[int] | None = None,
    ):
        super().__init__(vit, keep, layers)
        self.keep_numbers("tokens", tokens)

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
        return self.top(layer, tokens, self.uniform(layer, tokens))

    def uniform(self, layer: int, tokens: Tokens) -> Tensor:
        """Return numbers in [0, 1) for the rows, `[T]`, those of evaluation by their places alone."""
        position = tokens.layout.position
        if self.training:
            return torch.rand(len(position), device=position.device)
        generator = torch.Generator().manual_seed(self.seed * 1000 + layer)
        return torch.rand(max(tokens.layout.lengths), generator=generator).to(position.device)[position]


class ImportanceSampling(RandomPruning):
    """Draws tokens without replacement, with probabilities proportional to the attention Sig_j that they receive.

    Drawn one after the other, of those that are left, K tokens are distributed as the K largest of log Sig_j + G_j with
    independent Gumbel noise G = -log(-log u), u uniform (Gumbel-top-K).
    """

    needs = "received"

    def reduce(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        tiny = torch.finfo(torch.float32).tiny
        noise = -(-self.uniform(layer, tokens).clamp(min=tiny).log()).clamp(min=tiny).log()
        return self.top(layer, tokens, seen.clamp(min=tiny).log() + noise)


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
        group = groups_by_cell(tokens, self.side(layer))
        leader = torch.full((int(group.max()) + 1,), len(group), device=group.device)
        leader = leader.scatter_reduce(0, group, torch.arange(len(group), device=group.device), "amin")
        # New rows in the order of the first token of each: prefix tokens first, then as the picture has them.
        number = torch.empty_like(leader)
        number[leader.argsort()] = torch.arange(len(leader), device=leader.device)
        counts = torch.bincount(tokens.layout.picture[leader], minlength=len(tokens.layout.lengths)).tolist()
        return merge(tokens, number[group], counts, weight=tokens.area.clamp(min=1))

    def side(self, layer: int) -> int:
        """Return how many fine patches wide a cell is."""
        return self.stride ** (self.layers.index(layer) + 1)


class StridedConvolution(GridPooling):
    """Strided convolution: the stride x stride places p of a cell have matrices W_p of their own, which are learned.

        y = sum_r a_r (W_p(r) x_r + b) / sum_r a_r      over the tokens r in the cell, which cover a_r fine patches

    On fine tokens this is a convolution with the kernel W_p / stride². A token that is as wide as a cell or wider, such
    as a coarse one, is in all places at once: it has their mean. At the start W_p = 1 and b = 0: the average.
    """

    def __init__(self, vit: nn.Module, stride: int = 2, layers: Sequence[int] | None = None):
        super().__init__(vit, stride, layers)
        start = torch.eye(self.width).repeat(stride**2, 1, 1)
        self.weight = nn.ParameterDict({str(layer): nn.Parameter(start.clone()) for layer in self.layers})
        self.bias = nn.ParameterDict({str(layer): nn.Parameter(torch.zeros(self.width)) for layer in self.layers})

    def macs(self, layer: int, tokens: Tensor) -> Tensor:
        """Return the MACs of one matrix for each patch token."""
        return (tokens - self.prefix) * (self.width**2 if self.stride > 1 else 0)

    def reduce(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        if self.stride == 1:
            return tokens
        side, weight, x = self.side(layer), self.weight[str(layer)], tokens.x
        first, width = first_patches(tokens), tokens.where.shape[2]
        row, column = (place % side // (side // self.stride) for place in (first // width, first % width))
        place = (row * self.stride + column).masked_fill(tokens.area >= side**2, self.stride**2)
        place = place.masked_fill(tokens.layout.position < self.prefix, -1)
        for p, matrix in enumerate([*weight, weight.mean(0)]):
            rows = (place == p).nonzero()[:, 0]
            x = x.index_copy(0, rows, (tokens.x[rows] @ matrix.T + self.bias[str(layer)]).to(x.dtype))
        return super().reduce(layer, replace(tokens, x=x), seen)


def first_patches(tokens: Tokens) -> Tensor:
    """Return the number of the first fine patch under each token, `[T]`; for those with none, how many there are."""
    (b, h, w), device = tokens.where.shape, tokens.where.device
    place = torch.arange(h * w, device=device).expand(b, -1).flatten()
    rows, covered = tokens.where.flatten(), tokens.where.flatten() >= 0
    first = torch.full((len(tokens.x),), h * w, device=device)
    return first.scatter_reduce(0, rows[covered], place[covered], "amin")


def groups_by_cell(tokens: Tokens, side: int) -> Tensor:
    """Return a number for each token, `[T]`, that it shares with those whose first patch is in the same cell.

    Cells are side x side fine patches of a picture. A token that covers nothing is alone.
    """
    h, w = tokens.where.shape[1:]
    first = first_patches(tokens)
    cell = first // w // side * w + first % w // side
    alone = -1 - tokens.layout.position
    key = tokens.layout.picture * (h * w + len(first)) + cell.where(first < h * w, alone) + len(first)
    return key.unique(return_inverse=True)[1]
