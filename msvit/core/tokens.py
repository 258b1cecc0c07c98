"""Tokens: the one thing that travels through the network, and the tokenizer that makes them at two scales.

A picture has h x w coarse regions with k x k fine patches each. Its candidates are numbered

    0 ... P-1                   prefix tokens (class, distillation, registers)
    P ... P+hw-1                coarse tokens, row by row
    P+hw ... P+hw+hwk²-1        fine tokens, row by row

and a region's decision m says which of them are active: the coarse one (m = 1) or the k x k fine ones (m = 0).
A rule with three scales merges some 2 x 2 coarse regions into a block with one token. The tokens of blocks, where there
are any, have the numbers after the fine ones.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
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
    """

    x: Tensor
    activity: Tensor | None
    area: Tensor
    where: Tensor
    layout: Layout
    size: Tensor | None = None

    @property
    def weight(self) -> Tensor | None:
        """How much a token counts as a key, `[T]`; None if all count once."""
        if self.activity is None or self.size is None:
            return self.activity if self.size is None else self.size
        return self.activity * self.size

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
            size=None if self.size is None else self.size[rows],
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


def spread(blocks: Tensor, grid: tuple[int, int]) -> Tensor:
    """What holds for blocks `[B, h // 2, w // 2]`, said of the regions `[B, h, w]`; a last odd row is in no block."""
    regions = blocks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return F.pad(regions, (0, grid[1] - regions.shape[2], 0, grid[0] - regions.shape[1]))


def candidate_activity(decisions: Tensor, scale: int, prefix: int, blocks: Tensor | None = None) -> Tensor:
    """Activity of all candidates `[B, P + hw + hwk² + blocks]` from the decisions m `[B, h, w]`.

    Blocks `[B, h // 2, w // 2]` are 1 where 2 x 2 regions, coarse all four, have one token together.
    """
    coarse = decisions if blocks is None else decisions * (1 - spread(blocks, decisions.shape[1:]))
    fine = (1 - decisions).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    parts = [decisions.new_ones(len(decisions), prefix), coarse, fine] + ([] if blocks is None else [blocks])
    return torch.cat([part.flatten(1) for part in parts], 1)


def candidate_map(coarse: Tensor, scale: int, prefix: int, blocks: Tensor | None = None) -> Tensor:
    """The candidate that covers each fine patch, `[B, h k, w k]`, from the hard decisions `[B, h, w]`."""
    h, w = coarse.shape[1:]
    regions = torch.arange(prefix, prefix + h * w, device=coarse.device).view(h, w)
    if blocks is not None:
        first = prefix + h * w * (1 + scale**2)
        numbers = torch.arange(blocks[0].numel(), device=coarse.device).view_as(blocks[0]) + first
        regions = spread(numbers[None], (h, w)).where(spread(blocks, (h, w)) > 0.5, regions)
    regions = regions.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    fine = torch.arange(h * w * scale**2, device=coarse.device).view(h * scale, w * scale) + prefix + h * w
    return regions.where(coarse.repeat_interleave(scale, 1).repeat_interleave(scale, 2), fine)


def with_blocks(base: Tensor, fine: tuple[int, int], scale: int) -> Tensor:
    """What candidates are before their pixels are added, for blocks too: their positions are the fine ones' means."""
    positions = base[len(base) - fine[0] * fine[1] :].T.unflatten(1, fine)
    return torch.cat([base, shrink(positions, 2 * scale).flatten(1).T])


def choose_all(active: Tensor) -> tuple[Tensor, list[int]]:
    """Masked execution: every candidate of every picture."""
    return torch.arange(active.numel(), device=active.device), [active.shape[1]] * len(active)


def choose_active(active: Tensor) -> tuple[Tensor, list[int]]:
    """Packed execution: the active candidates `[B, N]` alone, as row numbers, and how many each picture has."""
    return active.flatten().nonzero()[:, 0], active.sum(1).tolist()


def choose_trimmed(active: Tensor, soft: Tensor, margin: float) -> tuple[Tensor, list[int]]:
    """Trimmed execution: all active candidates, and inactive ones with a soft activity `[B, N]` of `margin` or more.

    The gate's gradient is only lost where an inactive token is left out, and there it has the factor m (1 - m) of the
    sigmoid's derivative, which is less than the margin.
    """
    return choose_active(active | (soft.detach() >= margin))


def pixels_of(
    rows: Tensor, images: Tensor, patch: int, scale: int, prefix: int, blocks: bool = False
) -> tuple[Tensor, Tensor]:
    """What the chosen candidates see: their places in `rows` (prefix tokens see nothing) and pixels `[n, c S S]`.

    A coarse patch, and a block, is averaged down to the size of a fine one.
    """
    steps = [scale, 1, 2 * scale] if blocks else [scale, 1]
    grids = [(images.shape[-2] // (step * patch), images.shape[-1] // (step * patch)) for step in steps]
    candidates = prefix + sum(h * w for h, w in grids)
    picture, number = rows.div(candidates, rounding_mode="floor"), rows % candidates - prefix
    seeing, pixels = [], []
    for step, (h, w) in zip(steps, grids, strict=True):
        here = ((number >= 0) & (number < h * w)).nonzero()[:, 0]
        seeing.append(here)
        whole = images[..., : h * step * patch, : w * step * patch]
        pixels.append(_pick(shrink(whole, step), patch, (picture * h * w + number)[here]))
        number = number - h * w
    return torch.cat(seeing), torch.cat(pixels)


def _pick(images: Tensor, patch: int, numbers: Tensor) -> Tensor:
    """Pixels of these patches, counted over all pictures. All are cut first: picking pixel by pixel takes longer."""
    return patchify(images, patch).flatten(0, 1).index_select(0, numbers)


def shrink(images: Tensor, scale: int) -> Tensor:
    """Means over scale x scale pixels of `[..., H, W]`; rows and columns left over at the end are not seen.

    Sums of rows, then of columns, are many times as fast on a CPU as F.avg_pool2d.
    """
    if scale == 1:
        return images
    height, width = (side // scale * scale for side in images.shape[-2:])
    rows = sum(images[..., i:height:scale, :width] for i in range(scale))
    return sum(rows[..., i::scale] for i in range(scale)) / scale**2
