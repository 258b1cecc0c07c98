"""Tokens: the one thing that travels through the network, and how pixels are cut for them."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Layout
from .precision import in_full

MAPS = ("where", "others")  # which row is where in the picture
ROWS = ("x", "activity", "area", "size", "policy", "centre", "box")  # what tokens have one of each


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
        centre: `[T, 2]`, row and column of the middle of what a token covers, in fine patches from the upper left
            corner; of a merged token the mean of its members', weighted as its embedding is. 0 for prefix tokens. The
            tokenizer gives all tokens theirs; None in tokens that were made by hand.
        box: `[T, 4]`, top, left, bottom and right of what it covers, likewise; of a merged token those of the box
            around its members. 0 for prefix tokens.
        grids: `[B, 2]`, rows and columns of fine patches in each picture.
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
    centre: Tensor | None = None
    box: Tensor | None = None
    grids: Tensor | None = None

    @property
    def weight(self) -> Tensor | None:
        """How much a token counts as a key, `[T]`; None if all count once."""
        if self.activity is None or self.size is None:
            return self.activity if self.size is None else self.size
        return self.activity * self.size

    @property
    def sizes(self) -> Tensor:
        """How many times each token counts as a key, `[T]`, in float32 or better."""
        return in_full(torch.ones_like(self.x[:, 0]) if self.size is None else self.size)

    @property
    def extent(self) -> Tensor:
        """Height and width of what a token covers, in fine patches, `[T, 2]`; 0 for prefix tokens."""
        return self.box[:, 2:] - self.box[:, :2]

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
        kept = {name: None if (part := getattr(self, name)) is None else part[rows] for name in ROWS}
        maps = {name: None if (part := getattr(self, name)) is None else moved[part] for name in MAPS}
        return replace(self, **kept, **maps, layout=Layout(lengths, rows.device))

    def picture(self, b: int) -> "Tokens":
        """Return the tokens of one picture alone."""
        first, n = sum(self.layout.lengths[:b]), self.layout.lengths[b]
        rows, columns = self.grids[b].tolist()
        kept = {name: None if (part := getattr(self, name)) is None else part[first : first + n] for name in ROWS}
        maps = {name: None if (part := getattr(self, name)) is None else part[b : b + 1] for name in MAPS}
        maps = {name: None if part is None else part[..., :rows, :columns] for name, part in maps.items()}
        entered = None if self.entered is None else [self.entered[b]]
        layout = Layout([n], self.layout.device)
        alone = replace(self, **kept, **maps, entered=entered, layout=layout, grids=self.grids[b : b + 1])
        return alone.moved(-first)

    def moved(self, by: int) -> "Tokens":
        """Return the same tokens with maps for rows that have other numbers: so much larger."""
        maps = {name: getattr(self, name) for name in MAPS}
        shifted = {name: None if rows is None else (rows + by).masked_fill(rows < 0, -1) for name, rows in maps.items()}
        return replace(self, **shifted)

    def active_counts(self) -> Tensor:
        """Count the active tokens of each picture, int64 `[B]`."""
        if self.activity is None:
            return torch.tensor(self.layout.lengths, device=self.x.device)
        return self.layout.sum((self.activity.detach() > 0.5).long())


def join_pictures(parts: Sequence[Tokens]) -> Tokens:
    """Return the tokens of several pictures of any sizes, each by itself until now, as those of one batch.

    Maps have the size of the largest; beyond a smaller picture there is no token.
    """
    first, starts = parts[0], accumulate((len(part.x) for part in parts[:-1]), initial=0)
    sides = [max(part.where.shape[axis] for part in parts) for axis in (-2, -1)]
    moved = [part.moved(start) for part, start in zip(parts, starts, strict=True)]
    fields = {name: [getattr(part, name) for part in moved] for name in (*ROWS, *MAPS, "grids")}
    for name in MAPS:
        fields[name] = [None if rows is None else _grown(rows, sides) for rows in fields[name]]
    joined = {name: None if values[0] is None else torch.cat(values) for name, values in fields.items()}
    return replace(first, **joined, layout=Layout([n for p in parts for n in p.layout.lengths], first.layout.device))


def _grown(rows: Tensor, sides: Sequence[int]) -> Tensor:
    """Return a map `[..., H, W]` at the size of a larger picture, -1 beyond it."""
    return F.pad(rows, (0, sides[1] - rows.shape[-1], 0, sides[0] - rows.shape[-2]), value=-1)


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
    rows = reduce(operator.add, (images[..., i:height:scale, :width] for i in taps))
    return reduce(operator.add, (rows[..., i::scale] for i in taps)) / len(taps) ** 2
