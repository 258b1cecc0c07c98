"""The mixed-scale tokenizer: from decisions to embedded tokens, as many as an execution needs."""

from functools import partial
from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..core import backbone
from ..core.attention import Layout
from ..core.candidates import Candidates, choose_active, choose_levelled, choose_trimmed
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
    packed, path = execution == "packed", isinstance(coarse_embed, FullResolution)
    activity, geometry = candidates.activity(gating.undivided), candidates.geometry(images.device)
    rows, lengths = _choose(candidates, activity, gating, execution, margin)
    seats, numbers = candidates.seats(rows, len(images)), rows % candidates.count
    seen, patches = _embed(vit, candidates, seats, images, coarse_embed)
    bases = backbone.bases(vit, candidates, each=path, keep=packed)
    x = bases.index_select(0, numbers).to(patches.dtype).index_add_(0, seen, patches)
    places = geometry.places.index_select(0, numbers)
    active = seats if packed else seats.masked_fill(activity <= 0.5, -1)
    return Tokens(
        x=vit.norm_pre(vit.pos_drop(x)),
        activity=None if packed else activity.flatten()[rows],
        area=places[:, 6],
        where=candidates.on_patches(active).amax(1),
        layout=Layout(lengths, x.device),
        others=candidates.on_patches(seats) if both and activity.requires_grad and not packed else None,
        centre=places[:, 4:6],
        box=places[:, :4],
        grids=geometry.grid.expand(len(images), -1),
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
    vit: VisionTransformer, candidates: Candidates, seats: Tensor, images: Tensor, coarse_embed: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """Return what pixels add to tokens, embeddings `[n, C]`, and to which of the rows, `[n]`."""
    patch, path = backbone.patch_size(vit), isinstance(coarse_embed, FullResolution)
    levels, places, pixels = zip(*candidates.pixels(seats, images, patch, middle=path), strict=True)
    if coarse_embed is None or path:
        embedded = [backbone.embed(vit, torch.cat(pixels))]
    else:
        ways = [coarse_embed if level.side > 1 else partial(backbone.embed, vit) for level in levels]
        embedded = [embed(seen) for embed, seen in zip(ways, pixels, strict=True)]
    if path:
        for _, rows, parts in candidates.parts(seats, images, patch):
            places += (rows,)
            embedded.append(coarse_embed(backbone.embed(vit, parts)))
    return torch.cat(places), torch.cat(embedded)
