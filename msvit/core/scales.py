"""Scales: the sizes that tokens may have, and what decisions from the largest size down make of a picture.

A region of a level is one token, or it is divided into regions of the next smaller level, which are asked in turn. With
m_d(r) = 1 where region r of level d would be one token if it were asked, and A(r) the larger regions around it,

    u_d(r) = 1 - (1 - m_d(r)) prod_{a in A(r)} (1 - m(a))     undivided: inside one token, its own or a larger one
    a_d(r) = u_d(r) - u_{d+1}(parent of r)                    active: it has a token of its own
    a_0    = 1 - u_1                                          the fine patches

Lists of levels go from the smallest decided regions (d = 1) to the largest. With two scales there is one, and u = m.
What is left at the bottom and right, where no whole larger region fits, has no parent: it counts as divided.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def checked_scales(scales: Sequence[int], levels: int | None = None) -> tuple[int, ...]:
    """Return the sides of tokens in fine patches, or raise a ValueError that names what would work.

    Args:
        levels: How many of them a gate decides about, or None.
    """
    sides = tuple(scales) if isinstance(scales, list | tuple) else ()
    whole = all(type(side) is int for side in sides)
    if len(sides) < 2 or not whole or sides[0] != 1 or sides[1] < 2 or any(b != 2 * a for a, b in pairwise(sides[1:])):
        raise ValueError(
            f"scales={scales!r}: the first is 1, for fine patches, and each of the others twice the one before: a "
            "token is divided into 2 x 2; use (1, 2), (1, 2, 4), (1, 2, 4, 8) … (of two scales also (1, 3), (1, 4) …)"
        )
    if levels is not None and levels != len(sides) - 1:
        fitting = (*sides[:2], *(sides[1] * 2**i for i in range(1, levels)))
        raise ValueError(
            f"scales={sides} have {len(sides) - 1} sizes above the fine one, and the gate decides about {levels}; use "
            f"scales={fitting}, or another gate"
        )
    return sides


def grids_of(grid: tuple[int, int], sides: Sequence[int]) -> list[tuple[int, int]]:
    """Return the rows and columns of whole regions of each decided level, from those (h, w) of the smallest."""
    return [(grid[0] * sides[1] // side, grid[1] * sides[1] // side) for side in sides[1:]]


def check_room(sides: Sequence[int], grid: tuple[int, int], patch: int, size: tuple[int, int]):
    """Raise a ValueError unless a token of the largest scale fits into pictures of `size` pixels."""
    fitting = [side for side in sides if min(grid) * sides[1] >= side]
    if len(fitting) < len(sides):
        raise ValueError(
            f"scales={tuple(sides)}: a token of {sides[-1]} fine patches of {patch} px does not fit into a picture of "
            f"{size[0]} x {size[1]} px; use scales={tuple(fitting)}, or pictures of at least {sides[-1] * patch} px"
        )


def undivided(decisions: Sequence[Tensor]) -> list[Tensor]:
    """Return u of each level from m `[B, h, w]`, with the gradients of m."""
    levels = list(decisions[-1:])
    for m in reversed(decisions[:-1]):
        above = spread(levels[0], m.shape[-2:])
        levels.insert(0, m + (1 - m) * above)
    return levels


def nested(soft: Sequence[Tensor]) -> list[Tensor]:
    """Return of each level the largest soft value of a region and those around it, `[B, h, w]`.

    It exceeds a threshold exactly where the region is undivided under that threshold; the gradient is the largest's.
    """
    levels = list(soft[-1:])
    for m in reversed(soft[:-1]):
        levels.insert(0, m.maximum(spread(levels[0], m.shape[-2:])))
    return levels


def activity_of(whole: Sequence[Tensor], scale: int) -> list[Tensor]:
    """Return the activity of each level from u, from the largest regions to the fine patches, `[B, h, w]`.

    Args:
        scale: Fine patches along the side of the smallest decided region.
    """
    parts = [whole[-1]]
    for u, above in zip(reversed(whole[:-1]), reversed(whole[1:]), strict=True):
        parts.append(u - spread(above, u.shape[-2:]))
    return [*parts, enlarge(1 - whole[0], scale)]


def flips(decisions: Sequence[Tensor], soft: Sequence[Tensor], scale: int) -> list[Tensor]:
    """Return how near each candidate is to being active: what the gate that stands against it gives it, `[B, h, w]`.

    An active one has 1; one that a single other decision would make active has that decision's soft value, m of its own
    region or 1 - m of a larger one; one that two decisions stand against has 0, and no gradient comes to it. The order
    is that of `activity_of`.
    """
    near, open_, parts = torch.ones_like(soft[-1]), torch.ones_like(soft[-1]), []  # of what stands above a level
    for m, value in zip(reversed(decisions), reversed(soft), strict=True):
        if parts:
            near, open_ = (spread(above, m.shape[-2:], 1.0) for above in (near, open_))
        stops = m > 0.5
        parts.append(near.where(stops, open_ * value))
        near = (open_ * (1 - value)).where(stops, near)
        open_ = open_ * ~stops
    return [*parts, enlarge(near, scale)]


def token_sizes(whole: Sequence[Tensor]) -> Tensor:
    """Return the size of token over each smallest region, `[B, h, w]`: 0 fine, 1 its own, 2 the next larger one …"""
    grids, sizes = [u.shape[-2:] for u in whole], torch.zeros_like(whole[0], dtype=torch.long)
    for level, u in enumerate(whole):
        above = (u > 0).long()
        for grid in reversed(grids[:level]):
            above = spread(above, grid)
        sizes = sizes + above
    return sizes


def asked(grids: Sequence[tuple[int, int]], counts: Sequence[Tensor | int]) -> list[Tensor | int]:
    """Return how many regions of each level are asked, from the counts of undivided ones."""
    inside = [*(4 * n for n in counts[1:]), 0]
    return [math.prod(grid) - n for grid, n in zip(grids, inside, strict=True)]


def enlarge(regions: Tensor, scale: int) -> Tensor:
    """Return `[..., h, w]` with every region repeated for its scale x scale patches."""
    return regions.repeat_interleave(scale, -2).repeat_interleave(scale, -1)


def spread(values: Tensor, grid: tuple[int, int], rest: float = 0.0) -> Tensor:
    """Repeat what holds for larger regions for the 2 x 2 in each, `[B, *grid]`; a last odd row or column has `rest`."""
    regions = enlarge(values, 2)
    return F.pad(regions, (0, grid[1] - regions.shape[-1], 0, grid[0] - regions.shape[-2]), value=rest)
