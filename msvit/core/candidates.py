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

from .kept import Kept, recording
from .scales import activity_of, enlarge, flips
from .tokens import patchify, shrink

KEPT_GEOMETRIES = 32  # of pictures on a device, whose geometry is kept


class Level(NamedTuple):
    """Candidates of one size: their side in fine patches, how many rows and columns there are, and the first number."""

    side: int
    grid: tuple[int, int]
    first: int

    @property
    def count(self) -> int:
        return math.prod(self.grid)


Seen = tuple[Level, Tensor, Tensor]  # a level, rows of some of its tokens, and what they see


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

    def geometry(self, device: torch.device) -> "Geometry":
        """Return where the candidates lie; found once for a size of pictures on a device."""
        if recording():
            return self._geometry(device)

        def make() -> Geometry:
            with torch.inference_mode(False):  # it serves training as well
                return self._geometry(device)

        return GEOMETRIES.get((self, device), make)

    def _geometry(self, device: torch.device) -> "Geometry":
        boxes = torch.cat([torch.zeros(self.prefix, 4, device=device), *(self._boxes(n, device) for n in self.levels)])
        ends = [(n.side * n.grid[0], n.side * n.grid[1]) for n in self.levels]
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        sides = boxes[:, 2:] - boxes[:, :2]
        return Geometry(
            places=torch.cat([boxes, centres, sides.prod(1, keepdim=True)], 1),
            everywhere=self._everywhere(device),
            gaps=any(end[0] < self.fine.grid[0] or end[1] < self.fine.grid[1] for end in ends),
            grid=torch.tensor([self.fine.grid], device=device),
        )

    def _boxes(self, level: Level, device: torch.device) -> Tensor:
        starts = [level.side * torch.arange(n, device=device, dtype=torch.float32) for n in level.grid]
        ends = [(start + level.side).clamp(max=n) for start, n in zip(starts, self.fine.grid, strict=True)]
        return torch.cat([torch.cartesian_prod(*starts), torch.cartesian_prod(*ends)], 1)

    def _everywhere(self, device: torch.device) -> Tensor:
        numbers = [torch.arange(n.first, n.first + n.count, device=device).view(n.grid) for n in self.levels]
        rows, columns = self.fine.grid
        patches = [enlarge(found, level.side) for level, found in zip(self.levels, numbers, strict=True)]
        return torch.stack([F.pad(p, (0, columns - p.shape[1], 0, rows - p.shape[0]), value=-1) for p in patches])

    def positions(self, prefix: Tensor, fine: Tensor) -> Tensor:
        """Return `[N, C]` from the prefix tokens `[P, C]` and the fine positions; a larger token has their mean."""
        grid, means, (h, w) = fine.T.unflatten(1, self.fine.grid), [], self.fine.grid
        areas = self.geometry(fine.device).areas
        for level in self.levels:
            bottom, right = (n * level.side - inside for n, inside in zip(level.grid, (h, w), strict=True))
            inside = (level.side**2 / areas[level.first : level.first + level.count]).to(fine.dtype)
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

    def on_patches(self, values: Tensor) -> Tensor:
        """Return what the candidate of each level over a fine patch has, `[B, L, hk, wk]`; -1 where there is none.

        Args:
            values: Whole numbers of all candidates, `[B, N]`.
        """
        geometry = self.geometry(values.device)
        numbers = geometry.everywhere.clamp(min=0) if geometry.gaps else geometry.everywhere
        found = values.index_select(1, numbers.flatten()).view(-1, *numbers.shape)
        return found.masked_fill(geometry.everywhere < 0, -1) if geometry.gaps else found

    def pixels(self, seats: Tensor, images: Tensor, patch: int, middle: bool = False) -> Iterator[Seen]:
        """Yield, for each level, the rows of candidates that have a seat, and the pixels that they see `[n, c S S]`.

        What is larger than a fine patch is averaged down to the size of one, or interpolated (`middle`, see `shrink`).
        All patches of a level are cut first: picking pixel by pixel takes longer.
        """
        for level, rows, chosen in self._seated(seats):
            # What was cut has no name, which would keep it in memory while the next level is cut.
            yield level, rows, shrink(_cut(images, level, patch, chosen), level.side, middle).flatten(1)

    def parts(self, seats: Tensor, images: Tensor, patch: int) -> Iterator[Seen]:
        """Yield, for each level above the fine one, the same with fine patches `[n, side, side, c S S]` for pixels."""
        for level, rows, chosen in self._seated(seats):
            if level.side > 1:
                cut = patchify(_cut(images, level, patch, chosen), patch)
                yield level, rows, cut.unflatten(1, (level.side, level.side))

    def _seated(self, seats: Tensor) -> Iterator[tuple[Level, Tensor, Tensor]]:
        """Yield each level, the rows of its candidates that have a seat, and their numbers in the level, `[n]`.

        Numbers are counted over all pictures.
        """
        for level in self.levels:
            rows = seats[:, level.first : level.first + level.count].flatten()
            chosen = (rows >= 0).nonzero()[:, 0]
            yield level, rows.index_select(0, chosen), chosen

    def seats(self, rows: Tensor, pictures: int) -> Tensor:
        """Return the row in which each candidate of each picture sits, `[B, N]`; -1 for those that were left out."""
        seats = torch.full((pictures * self.count,), -1, device=rows.device)
        seats[rows] = torch.arange(len(rows), device=rows.device)
        return seats.view(pictures, self.count)


def _cut(images: Tensor, level: Level, patch: int, chosen: Tensor) -> Tensor:
    """Return the pixels of chosen candidates of a level, `[n, c, side S, side S]`."""
    side = level.side * patch
    whole = images[..., : level.grid[0] * side, : level.grid[1] * side]
    cells = patchify(whole, side).flatten(0, 1).index_select(0, chosen)
    return cells.view(cells.shape[0], images.shape[1], side, side)


class Geometry(NamedTuple):
    """Where the candidates of pictures of one size lie, the same whatever is in them.

    Attributes:
        places: `[N, 7]`, in fine patches: the box that a candidate covers (top, left, bottom, right), its centre (row,
            column), and its area. 0 for prefix tokens.
        everywhere: `[L, hk, wk]`, the candidate of each level that covers each fine patch, active or not; -1 where
            there is none.
        gaps: Whether there is none anywhere.
        grid: `[1, 2]`, rows and columns of fine patches.
    """

    places: Tensor
    everywhere: Tensor
    gaps: bool
    grid: Tensor

    @property
    def areas(self) -> Tensor:
        """How many fine patches each candidate covers, `[N]`."""
        return self.places[:, 6]


GEOMETRIES: Kept[Geometry] = Kept(KEPT_GEOMETRIES)


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
