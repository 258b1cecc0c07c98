"""Candidates: every token that a picture could have, how they are numbered, and which of them an execution takes.

A picture has h x w coarse regions with k x k fine patches each. Its candidates are numbered

    0 ... P-1                   prefix tokens (class, distillation, registers)
    P ... P+hw-1                coarse tokens, row by row
    P+hw ... P+hw+hwk²-1        fine tokens, row by row

and a region's decision m says which of them are active: the coarse one (m = 1) or the k x k fine ones (m = 0). With
more scales the tokens of larger regions come before the coarse ones, the largest first; `scales` says which are active.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .scales import activity_of, enlarge, flips
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
    """The candidates of pictures with `grid` coarse regions of sides[1] x sides[1] fine patches.

    Of the last rows and columns of regions a part may lie outside of the picture. There are no candidates for the fine
    patches there, and a larger token stands for those inside alone.

    Args:
        sides: Of tokens, in fine patches, from 1 up.
        prefix: How many prefix tokens there are.
        patches: Rows and columns of fine patches inside the picture; None: all of those of the regions.
    """

    grid: tuple[int, int]
    sides: tuple[int, ...]
    prefix: int
    patches: tuple[int, int] | None = None

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The sizes of tokens from the largest to the fine ones, by their numbers."""
        whole, levels, first = tuple(n * self.sides[1] for n in self.grid), [], self.prefix
        for side in reversed(self.sides):
            grid = tuple(n // side for n in whole)
            levels.append(Level(side, grid if side > 1 else self.patches or whole, first))
            first += levels[-1].count
        return tuple(levels)

    @property
    def fine(self) -> Level:
        return self.levels[-1]

    @property
    def count(self) -> int:
        """N, candidates of a picture."""
        return self.levels[-1].first + self.levels[-1].count

    def boxes(self, device: torch.device) -> Tensor:
        """Return what of the picture each candidate covers, `[N, 4]`, in fine patches: top, left, bottom, right.

        Nothing, all 0, for prefix tokens.
        """
        return torch.cat([torch.zeros(self.prefix, 4, device=device), *(self._boxes(n, device) for n in self.levels)])

    def _boxes(self, level: Level, device: torch.device) -> Tensor:
        starts = [level.side * torch.arange(n, device=device, dtype=torch.float32) for n in level.grid]
        ends = [(start + level.side).clamp(max=n) for start, n in zip(starts, self.fine.grid, strict=True)]
        return torch.cat([torch.cartesian_prod(*starts), torch.cartesian_prod(*ends)], 1)

    def areas(self, device: torch.device) -> Tensor:
        """Return how many fine patches each candidate covers, `[N]`; 0 for prefix tokens."""
        return areas_of(self.boxes(device))

    def positions(self, prefix: Tensor, fine: Tensor) -> Tensor:
        """Return `[N, C]` from the prefix tokens `[P, C]` and the fine positions; a larger token has their mean."""
        grid, means, (h, w) = fine.T.unflatten(1, self.fine.grid), [], self.fine.grid
        for level in self.levels:
            bottom, right = (n * level.side - inside for n, inside in zip(level.grid, (h, w), strict=True))
            inside = (level.side**2 / areas_of(self._boxes(level, fine.device))).to(fine.dtype)
            means.append(shrink(F.pad(grid, (0, right, 0, bottom)), level.side).flatten(1).T * inside[:, None])
        return torch.cat([prefix, *means])

    def activity(self, whole: Sequence[Tensor]) -> Tensor:
        """Return the activity of all candidates `[B, N]` from u of each level, see `scales.undivided`."""
        return self._joined(activity_of(whole, self.sides[1]))

    def flips(self, decisions: Sequence[Tensor], soft: Sequence[Tensor]) -> Tensor:
        """Return how near each candidate is to being active, `[B, N]`, see `scales.flips`."""
        return self._joined(flips(decisions, soft, self.sides[1]))

    def _joined(self, parts: list[Tensor]) -> Tensor:
        ones, (rows, columns) = parts[0].new_ones(len(parts[0]), self.prefix), self.fine.grid
        parts = [*parts[:-1], parts[-1][..., :rows, :columns]]
        return torch.cat([ones, *(part.flatten(1) for part in parts)], 1)

    def covering(self, whole: Sequence[Tensor]) -> Tensor:
        """Return the active candidate that covers each fine patch, `[B, hk, wk]`, from u of each level."""
        levels = self.everywhere(whole[0].device)
        covered = levels[-1].expand(len(whole[0]), -1, -1)
        for level, numbers, u in zip(reversed(self.levels[:-1]), reversed(levels[:-1]), whole, strict=True):
            covered = numbers.where(self._on_patches(u > 0.5, level.side, False), covered)
        return covered

    def everywhere(self, device: torch.device) -> Tensor:
        """Return the candidate of each level that covers each fine patch, `[L, hk, wk]`; -1 where there is none."""
        numbers = [torch.arange(n.first, n.first + n.count, device=device).view(n.grid) for n in self.levels]
        pairs = zip(self.levels, numbers, strict=True)
        return torch.stack([self._on_patches(found, level.side, -1) for level, found in pairs])

    def _on_patches(self, regions: Tensor, side: int, rest: float) -> Tensor:
        """Repeat `[..., h, w]` for the side x side fine patches of each region, with `rest` where there is none."""
        patches, (rows, columns) = enlarge(regions, side), self.fine.grid
        return F.pad(patches, (0, columns - patches.shape[-1], 0, rows - patches.shape[-2]), value=rest)

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


def areas_of(boxes: Tensor) -> Tensor:
    """Return how many fine patches boxes `[N, 4]` hold, `[N]`."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


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
