"""Tokens: the one thing that travels through the network, and the tokenizer that makes them at two scales.

A picture has h x w coarse regions with k x k fine patches each. Its candidates are numbered

    0 ... P-1                   prefix tokens (class, distillation, registers)
    P ... P+hw-1                coarse tokens, row by row
    P+hw ... P+hw+hwk²-1        fine tokens, row by row

and a region's decision m says which of them are active: the coarse one (m = 1) or the k x k fine ones (m = 0).
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import Layout


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch of pictures, one row each.

    Attributes:
        x: Embeddings `[T, C]`.
        activity: `[T]`, 1 for active, 0 for inactive, with the gate's gradient while it trains; None if all are active.
        area: `[T]`, how many fine patches a token stands for; 0 for prefix tokens.
        where: `[B, H_f, W_f]`, the row of the active token that covers each fine patch; -1 where it was dropped.
        layout: Which rows belong to which picture.
    """

    x: Tensor
    activity: Tensor | None
    area: Tensor
    where: Tensor
    layout: Layout

    def scatter(self, rows: Tensor | None = None) -> Tensor:
        """Rows `[T, ...]` (the embeddings if not given) on the fine grid `[B, H_f, W_f, ...]`; 0 where dropped."""
        grid = (self.x if rows is None else rows)[self.where.clamp(min=0)]
        kept = (self.where >= 0).view(*self.where.shape, *[1] * (grid.dim() - 3))
        return grid.where(kept, torch.zeros((), dtype=grid.dtype, device=grid.device))

    def paint(self, values: Tensor, size: tuple[int, int], dropped: float = math.nan) -> Tensor:
        """Values `[T]`, one per token, on the pixels `[B, *size]` that the token covers."""
        grid = values.to(torch.get_default_dtype())[self.where.clamp(min=0)]
        grid = grid.masked_fill(self.where < 0, dropped)
        rows, columns = size[0] // grid.shape[1], size[1] // grid.shape[2]
        return grid.repeat_interleave(rows, 1).repeat_interleave(columns, 2)

    def select(self, rows: Tensor, lengths: list[int]) -> "Tokens":
        """Only the given rows, in picture order; what they do not hold is dropped from the map."""
        moved = torch.full((len(self.x),), -1, device=rows.device)
        moved[rows] = torch.arange(len(rows), device=rows.device)
        return replace(
            self,
            x=self.x[rows],
            activity=None if self.activity is None else self.activity[rows],
            area=self.area[rows],
            where=moved[self.where.clamp(min=0)].where(self.where >= 0, -1),
            layout=Layout(lengths, rows.device),
        )

    def active_counts(self) -> Tensor:
        """Active tokens of each picture, int64 `[B]`."""
        if self.activity is None:
            return torch.tensor(self.layout.lengths, device=self.x.device)
        return self.layout.sum((self.activity.detach() > 0.5).long())


def patchify(images: Tensor, patch: int) -> Tensor:
    """Pixels of all patches: `[B, c, H, W]` to `[B, (H / patch)(W / patch), c patch patch]`."""
    b, c, height, width = images.shape
    h, w = height // patch, width // patch
    cut = images.reshape(b, c, h, patch, w, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, c * patch * patch)


def candidate_activity(decisions: Tensor, scale: int, prefix: int) -> Tensor:
    """Activity of all candidates `[B, P + hw + hwk²]` from the decisions m `[B, h, w]`."""
    b = len(decisions)
    coarse = decisions.flatten(1)
    fine = (1 - decisions).repeat_interleave(scale, 1).repeat_interleave(scale, 2).flatten(1)
    return torch.cat([decisions.new_ones(b, prefix), coarse, fine], 1)


def candidate_map(coarse: Tensor, scale: int, prefix: int) -> Tensor:
    """The candidate that covers each fine patch, `[B, h k, w k]`, from the hard decisions `[B, h, w]`."""
    h, w = coarse.shape[1:]
    regions = torch.arange(prefix, prefix + h * w, device=coarse.device).view(h, w)
    regions = regions.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    fine = torch.arange(h * w * scale**2, device=coarse.device).view_as(regions) + prefix + h * w
    return regions.where(coarse.repeat_interleave(scale, 1).repeat_interleave(scale, 2), fine)


def choose_all(active: Tensor) -> tuple[Tensor, list[int]]:
    """Masked execution: every candidate of every picture."""
    return torch.arange(active.numel(), device=active.device), [active.shape[1]] * len(active)


def choose_active(active: Tensor) -> tuple[Tensor, list[int]]:
    """Packed execution: the active candidates `[B, N]` alone, as row numbers, and how many each picture has."""
    return active.flatten().nonzero()[:, 0], active.sum(1).tolist()


def choose_trimmed(active: Tensor, soft: Tensor, slack: float) -> tuple[Tensor, list[int]]:
    """Trimmed execution: all active candidates, and the inactive ones nearest to the decision boundary.

    Every picture gets as many rows as the one with the most active tokens has, and the share `slack` more. The gate's
    gradient is only lost where an inactive token is left out, and there the derivative of its sigmoid is smallest.
    """
    most = int(active.sum(1).max())
    room = min(active.shape[1], most + math.ceil(slack * most))
    rank = active + soft.detach().clamp(0, 1)
    kept = rank.topk(room, dim=1).indices.sort(1).values
    start = torch.arange(len(active), device=active.device)[:, None] * active.shape[1]
    return (kept + start).flatten(), [room] * len(active)


def pixels_of(rows: Tensor, images: Tensor, patch: int, scale: int, prefix: int) -> tuple[Tensor, Tensor]:
    """What the chosen candidates see: their places in `rows` (prefix tokens see nothing) and pixels `[n, c S S]`.

    A coarse patch is averaged down to the size of a fine one.
    """
    reduced = F.avg_pool2d(images, scale)
    pool = torch.cat([patchify(reduced, patch), patchify(images, patch)], 1)
    candidates = prefix + pool.shape[1]
    picture, number = rows.div(candidates, rounding_mode="floor"), rows % candidates
    if not prefix:
        return torch.arange(len(rows), device=rows.device), pool.flatten(0, 1)[rows]
    seeing = (number >= prefix).nonzero()[:, 0]
    return seeing, pool.flatten(0, 1)[(picture * pool.shape[1] + number - prefix)[seeing]]
