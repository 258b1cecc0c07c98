"""Candidates: every token that a picture could have, how they are numbered, and which of them an execution takes.

A picture has h x w coarse regions with k x k fine patches each. Its candidates are numbered

    0 ... P-1                   prefix tokens (class, distillation, registers)
    P ... P+hw-1                coarse tokens, row by row
    P+hw ... P+hw+hwk²-1        fine tokens, row by row

and a region's decision m says which of them are active: the coarse one (m = 1) or the k x k fine ones (m = 0).
A rule with three scales merges some 2 x 2 coarse regions into a block with one token. The tokens of blocks, where there
are any, have the numbers after the fine ones.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tokens import patchify, shrink


class Level(NamedTuple):
    """Candidates of one size: their side in fine patches, how many rows and columns there are, and the first number."""

    side: int
    grid: tuple[int, int]
    first: int

    @property
    def count(self) -> int:
        return math.prod(self.grid)


@dataclass(frozen=True)
class Candidates:
    """The candidates of pictures with `grid` coarse regions of `scale` x `scale` fine patches.

    Args:
        prefix: How many prefix tokens there are.
        blocks: Whether blocks of 2 x 2 regions are among the candidates.
    """

    grid: tuple[int, int]
    scale: int
    prefix: int
    blocks: bool = False

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """Coarse, fine, and blocks where there are any, by their numbers."""
        (h, w), k, levels, first = self.grid, self.scale, [], self.prefix
        for side, grid in ((k, (h, w)), (1, (h * k, w * k)), (2 * k, (h // 2, w // 2)))[: 3 if self.blocks else 2]:
            levels.append(Level(side, grid, first))
            first += levels[-1].count
        return tuple(levels)

    @property
    def fine(self) -> Level:
        return self.levels[1]

    @property
    def count(self) -> int:
        """N, candidates of a picture."""
        return self.levels[-1].first + self.levels[-1].count

    def areas(self, device: torch.device) -> Tensor:
        """Return how many fine patches each candidate covers, `[N]`; 0 for prefix tokens."""
        covered = [torch.full((level.count,), float(level.side**2), device=device) for level in self.levels]
        return torch.cat([torch.zeros(self.prefix, device=device), *covered])

    def positions(self, prefix: Tensor, fine: Tensor) -> Tensor:
        """Return `[N, C]` from the prefix tokens `[P, C]` and the fine positions; a larger token has their mean."""
        grid = fine.T.unflatten(1, self.fine.grid)
        return torch.cat([prefix, *(shrink(grid, level.side).flatten(1).T for level in self.levels)])

    def activity(self, decisions: Tensor, blocks: Tensor | None = None) -> Tensor:
        """Return the activity of all candidates `[B, N]` from the decisions m `[B, h, w]`.

        Blocks `[B, h // 2, w // 2]` are 1 where 2 x 2 regions, coarse all four, have one token together.
        """
        coarse = decisions if blocks is None else decisions * (1 - spread(blocks, self.grid))
        fine = enlarge(1 - decisions, self.scale)
        parts = [decisions.new_ones(len(decisions), self.prefix), coarse, fine] + ([] if blocks is None else [blocks])
        return torch.cat([part.flatten(1) for part in parts], 1)

    def covering(self, coarse: Tensor, blocks: Tensor | None = None) -> Tensor:
        """Return the candidate that covers each fine patch, `[B, hk, wk]`, from the hard decisions `[B, h, w]`."""
        coarse_level, fine_level, *block_level = self.levels
        regions = self._numbers(coarse_level, coarse.device)
        if blocks is not None:
            numbers = self._numbers(block_level[0], coarse.device)
            regions = spread(numbers[None], self.grid).where(spread(blocks, self.grid) > 0.5, regions)
        fine = self._numbers(fine_level, coarse.device)
        return enlarge(regions, self.scale).where(enlarge(coarse, self.scale), fine)

    def _numbers(self, level: Level, device: torch.device) -> Tensor:
        return torch.arange(level.first, level.first + level.count, device=device).view(level.grid)

    def pixels(self, rows: Tensor, images: Tensor, patch: int, middle: bool = False) -> tuple[Tensor, Tensor]:
        """Return what chosen candidates see: their places in `rows`, and pixels `[n, c S S]`.

        Rows are counted over all pictures. Prefix tokens see nothing; what is larger than a fine patch is averaged down
        to the size of one, or interpolated (`middle`, see `shrink`). All patches of a level are cut first: picking
        pixel by pixel takes longer.
        """
        places, pixels = [], []
        for side, (h, w), here, seen in self._chosen(rows):
            places.append(here)
            whole = images[..., : h * side * patch, : w * side * patch]
            # The cut patches have no name, which would keep those of the last level in memory while all are joined.
            pixels.append(patchify(shrink(whole, side, middle), patch).flatten(0, 1).index_select(0, seen))
        return torch.cat(places), torch.cat(pixels)

    def parts(self, rows: Tensor, images: Tensor, patch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each level above the fine one, chosen candidates and the fine patches in them at full resolution.

        They are places in `rows`, and pixels `[n, side, side, c S S]`.
        """
        for side, (h, w), here, seen in self._chosen(rows):
            if side > 1:
                whole = images[..., : h * side * patch, : w * side * patch]
                cut = patchify(whole, side * patch).flatten(0, 1).index_select(0, seen)
                cut = cut.view(len(seen), images.shape[1], side * patch, side * patch)
                yield here, patchify(cut, patch).unflatten(1, (side, side))

    def _chosen(self, rows: Tensor) -> Iterator[tuple[int, tuple[int, int], Tensor, Tensor]]:
        """Yield each level's side and grid, the places in `rows` of its candidates, and their numbers in the level."""
        picture, number = rows.div(self.count, rounding_mode="floor"), rows % self.count
        for level in self.levels:
            here = ((number >= level.first) & (number < level.first + level.count)).nonzero()[:, 0]
            yield level.side, level.grid, here, (picture * level.count + number - level.first)[here]

    def seats(self, rows: Tensor, pictures: int) -> Tensor:
        """Return the row in which each candidate of each picture sits, `[B, N]`; -1 for those that were left out."""
        seats = torch.full((pictures * self.count,), -1, device=rows.device)
        seats[rows] = torch.arange(len(rows), device=rows.device)
        return seats.view(pictures, self.count)


def choose_active(active: Tensor) -> tuple[Tensor, list[int]]:
    """Return the numbers of active candidates `[B, N]`, counted over all pictures, and how many each picture has."""
    return active.flatten().nonzero()[:, 0], active.sum(1).tolist()


def choose_trimmed(active: Tensor, soft: Tensor, margin: float) -> tuple[Tensor, list[int]]:
    """Choose active candidates, and inactive ones of a soft activity `[B, N]` of `margin` or more: trimmed execution.

    The gate's gradient is only lost where an inactive token is left out, and there it has the factor m (1 - m) of the
    sigmoid's derivative, which is less than the margin.
    """
    return choose_active(active | (soft.detach() >= margin))


def choose_levelled(active: Tensor, soft: Tensor) -> tuple[Tensor, list[int]]:
    """Choose as many candidates for every picture as the batch's longest has active ones: MSViT's adaptive trimming.

    The room that a shorter picture has is filled with its inactive candidates `[B, N]` nearest to the decision, those
    of the largest soft activity.
    """
    most = int(active.sum(1).max())
    chosen = (soft.detach() + 2 * active).topk(most, dim=1).indices  # whatever is active comes before what is not
    return choose_active(torch.zeros_like(active).scatter(1, chosen, True))


def enlarge(regions: Tensor, scale: int) -> Tensor:
    """Return `[..., h, w]` with every region repeated for its scale x scale patches."""
    return regions.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def spread(blocks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Repeat what holds for blocks `[B, h // 2, w // 2]` for the regions `[B, h, w]`; a last odd row has none."""
    regions = enlarge(blocks, 2)
    return F.pad(regions, (0, grid[1] - regions.shape[-1], 0, grid[0] - regions.shape[-2]))
