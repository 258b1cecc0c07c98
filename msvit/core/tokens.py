"""Tokens: the one thing that travels through the network, and how pixels are cut for them."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .attention import Layout


@dataclass(frozen=True)
class Tokens:
    """The tokens of a batch of pictures, one row each.

    Attributes:
        x: Embeddings `[T, C]`.
        activity: `[T]`, 1 for active, 0 for inactive, with the gate's gradient while it trains; None if all are active.
        area: `[T]`, how many fine patches a token stands for; 0 for prefix tokens.
        where: `[B, H_f, W_f]`, the row of the active token that covers each fine patch; -1 where it was dropped.
        layout: Which rows belong to which picture. Prefix tokens are the first rows of each.
        size: `[T]`, how many times a token counts as a key (ToMe's proportional attention); None if all count once.
        others: `[B, L, H_f, W_f]`, the row of each scale that covers each fine patch, active or not; -1 where it was
            trimmed. Only dense tasks ask for it, while a gate learns.
        entered: How many were active in each picture before the first block; None if no reducer asks.
        policy: `[T]`, the part of the activity that is a reducer's while it trains, see `attend_by_policy`.
    """

    x: Tensor
    activity: Tensor | None
    area: Tensor
    where: Tensor
    layout: Layout
    size: Tensor | None = None
    others: Tensor | None = None
    entered: list[int] | None = None
    policy: Tensor | None = None

    @property
    def weight(self) -> Tensor | None:
        """How much a token counts as a key, `[T]`; None if all count once."""
        if self.activity is None or self.size is None:
            return self.activity if self.size is None else self.size
        return self.activity * self.size

    def scatter(self, rows: Tensor | None = None) -> Tensor:
        """Return rows `[T, ...]` (by default the embeddings) on the fine grid `[B, H_f, W_f, ...]`; 0 where dropped."""
        rows = self.x if rows is None else rows
        grid = rows.index_select(0, self.where.clamp(min=0).flatten()).view(*self.where.shape, *rows.shape[1:])
        kept = (self.where >= 0).view(*self.where.shape, *[1] * (grid.dim() - 3))
        return grid.where(kept, torch.zeros((), dtype=grid.dtype, device=grid.device))

    def paint(self, values: Tensor, size: tuple[int, int], dropped: float = math.nan) -> Tensor:
        """Paint values `[T]`, one per token, on the pixels `[B, *size]` that the token covers."""
        grid = values.to(torch.get_default_dtype())[self.where.clamp(min=0)]
        grid = grid.masked_fill(self.where < 0, dropped)
        rows, columns = size[0] // grid.shape[1], size[1] // grid.shape[2]
        return grid.repeat_interleave(rows, 1).repeat_interleave(columns, 2)

    def select(self, rows: Tensor, lengths: list[int]) -> "Tokens":
        """Return the given rows alone, in picture order; what they do not hold is dropped from the map."""
        moved = torch.full((len(self.x) + 1,), -1, device=rows.device)  # the last one: nothing stays nothing
        moved[rows] = torch.arange(rows.shape[0], device=rows.device)
        return replace(
            self,
            x=self.x[rows],
            activity=None if self.activity is None else self.activity[rows],
            area=self.area[rows],
            size=None if self.size is None else self.size[rows],
            where=moved[self.where],
            others=None if self.others is None else moved[self.others],
            policy=None if self.policy is None else self.policy[rows],
            layout=Layout(lengths, rows.device),
        )

    def active_counts(self) -> Tensor:
        """Count the active tokens of each picture, int64 `[B]`."""
        if self.activity is None:
            return torch.tensor(self.layout.lengths, device=self.x.device)
        return self.layout.sum((self.activity.detach() > 0.5).long())


def patchify(images: Tensor, patch: int) -> Tensor:
    """Return the pixels of all patches, `[B, (H / patch)(W / patch), c patch patch]`, of `[B, c, H, W]`."""
    b, c, height, width = images.shape
    h, w = height // patch, width // patch
    cut = images.reshape(b, c, h, patch, w, patch)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, c * patch * patch)


def shrink(images: Tensor, scale: int, middle: bool = False) -> Tensor:
    """Return the means over scale x scale pixels of `[..., H, W]`; rows and columns left over at the end are not seen.

    With `middle`, over the middle 2 x 2 of them: bilinear interpolation without antialias, for even scales. Sums of
    rows, then of columns, are many times as fast on a CPU as F.avg_pool2d.
    """
    if scale == 1:
        return images
    height, width = (side // scale * scale for side in images.shape[-2:])
    taps = (scale // 2 - 1, scale // 2) if middle else range(scale)
    rows = sum(images[..., i:height:scale, :width] for i in taps)
    return sum(rows[..., i::scale] for i in taps) / len(taps) ** 2
