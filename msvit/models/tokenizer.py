"""The mixed-scale tokenizer: from decisions to embedded tokens, as many as an execution needs."""

from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..core import backbone
from ..core.attention import Layout
from ..core.candidates import Candidates, areas_of, choose_active, choose_levelled, choose_trimmed
from ..core.scales import nested, undivided
from ..core.tokens import Tokens
from .coarse import FullResolution

EXECUTIONS = ("masked", "trimmed", "levelled", "packed")


class Gating(NamedTuple):
    """What was decided about a batch: the gate's logits (None without one), soft values, and m, 1 = one token.

    It says so of the smallest regions that can be one token, `[B, h, w]`. With more than two scales m is what a region
    would be if it were asked, and `larger` has the same of the larger regions, from small to large. Where a model is
    evaluated, regions inside of an undivided one are not asked: their logits are -inf.
    """

    scores: Tensor | None
    soft: Tensor
    decisions: Tensor
    larger: tuple["Gating", ...] = ()

    @property
    def levels(self) -> tuple["Gating", ...]:
        """All sizes of regions, from small to large."""
        return (self, *self.larger)

    @property
    def undivided(self) -> list[Tensor]:
        """u of each level, 1 where a region lies within one token, with the gradients of m."""
        return undivided([level.decisions for level in self.levels])

    @property
    def nested(self) -> list[Tensor]:
        """Soft values of each level that exceed a threshold where, under it, the region would be undivided."""
        return nested([level.soft for level in self.levels])

    def picture(self, b: int) -> "Gating":
        """Return what was decided about one picture."""
        own = (None if part is None else part[b : b + 1] for part in self[:3])
        return Gating(*own, tuple(level.picture(b) for level in self.larger))


def tokenize(
    vit: VisionTransformer,
    images: Tensor,
    candidates: Candidates,
    gating: Gating,
    execution: str,
    margin: float,
    coarse_embed: nn.Module | None = None,
    both: bool = False,
) -> Tokens:
    """Return the tokens that an execution needs, embedded, before the first block.

    Args:
        margin: Of trimming, see `choose_trimmed`.
        coarse_embed: How coarse patches are embedded, from `make_coarse_embed`.
        both: While a gate learns, also tell which row of each level covers each fine patch.
    """
    whole = gating.undivided
    activity = candidates.activity(whole)
    rows, lengths = _choose(candidates, activity, gating, execution, margin)
    numbers = rows % candidates.count
    seeing, patches = _embed(vit, candidates, rows, images, coarse_embed)
    bases = backbone.bases(vit, candidates, each=isinstance(coarse_embed, FullResolution))
    x = bases.index_select(0, numbers).to(patches.dtype).index_add_(0, seeing, patches)
    seats, learns = candidates.seats(rows, len(images)), activity.requires_grad and execution != "packed"
    boxes = candidates.boxes(rows.device)[numbers]
    return Tokens(
        x=vit.norm_pre(vit.pos_drop(x)),
        activity=None if execution == "packed" else activity.flatten()[rows],
        area=areas_of(boxes),
        where=_seated(seats, candidates.covering(whole)),
        layout=Layout(lengths, x.device),
        others=_seats_of_levels(seats, candidates) if both and learns else None,
        centre=(boxes[:, :2] + boxes[:, 2:]) / 2,
        box=boxes,
        grids=torch.tensor(candidates.fine.grid, device=rows.device).expand(images.shape[0], -1),
    )


def _choose(
    candidates: Candidates, activity: Tensor, gating: Gating, execution: str, margin: float
) -> tuple[Tensor, list[int]]:
    """Return the candidates that an execution takes along, counted over all pictures, and how many of each one."""
    active = activity.detach() > 0.5
    if execution == "packed":
        return choose_active(active)
    if execution == "masked":
        return torch.arange(active.numel(), device=active.device), [active.shape[1]] * len(active)
    levels = gating.levels
    near = candidates.flips([level.decisions for level in levels], [level.soft.detach() for level in levels])
    if execution == "levelled":
        return choose_levelled(active, near)
    # Inactive tokens are there for their gradient.
    return choose_trimmed(active, near, margin if activity.requires_grad else 1.0)


def _embed(
    vit: VisionTransformer, candidates: Candidates, rows: Tensor, images: Tensor, coarse_embed: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """Return what pixels add to candidates, embeddings `[n, C]`, and to which of the rows, places `[n]`."""
    patch, path = backbone.patch_size(vit), isinstance(coarse_embed, FullResolution)
    places, pixels = candidates.pixels(rows, images, patch, middle=path)
    if coarse_embed is None:
        return places, backbone.embed(vit, pixels)
    if path:
        added = [(places, backbone.embed(vit, pixels))]
        for here, parts in candidates.parts(rows, images, patch):
            added.append((here, coarse_embed(backbone.embed(vit, parts))))
        places, embeddings = (torch.cat(part) for part in zip(*added, strict=True))
        return places, embeddings
    coarse = rows[places] % candidates.count < candidates.fine.first
    own, shared = coarse.nonzero()[:, 0], (~coarse).nonzero()[:, 0]
    both = torch.cat([backbone.embed(vit, pixels[shared]), coarse_embed(pixels[own])])
    return places[torch.cat([shared, own])], both


def _seated(seats: Tensor, numbers: Tensor) -> Tensor:
    """Return the rows of candidates that cover fine patches, `[B, H_f, W_f]`, from where each candidate sits."""
    return seats.gather(1, numbers.flatten(1)).view_as(numbers)


def _seats_of_levels(seats: Tensor, candidates: Candidates) -> Tensor:
    """Return the row of each level that covers each fine patch, `[B, L, H_f, W_f]`; -1 where it was left out."""
    numbers = candidates.everywhere(seats.device)
    rows = seats[:, numbers.clamp(min=0).flatten()].view(len(seats), *numbers.shape)
    return rows.masked_fill(numbers < 0, -1)
