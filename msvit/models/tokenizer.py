"""The mixed-scale tokenizer: from decisions to embedded tokens, as many as an execution needs."""

from typing import NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..core import backbone
from ..core.attention import Layout
from ..core.candidates import Candidates, choose_active, choose_levelled, choose_trimmed
from ..core.tokens import Tokens
from .coarse import FullResolution

EXECUTIONS = ("masked", "trimmed", "levelled", "packed")


class Gating(NamedTuple):
    """What was decided about a batch: the gate's logits (None without one), soft values, and m, 1 = coarse.

    Blocks `[B, h // 2, w // 2]` are 1 where 2 x 2 coarse regions have one token; None with two scales.
    """

    scores: Tensor | None
    soft: Tensor
    decisions: Tensor
    blocks: Tensor | None = None


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
        both: While a gate learns, also tell which row would cover each fine patch if its region were decided the other
            way.
    """
    activity = candidates.activity(gating.decisions, gating.blocks)
    rows, lengths = _choose(candidates, activity, gating, execution, margin)
    numbers = rows % candidates.count
    seeing, patches = _embed(vit, candidates, rows, images, coarse_embed)
    bases = backbone.bases(vit, candidates, each=isinstance(coarse_embed, FullResolution))
    x = bases.index_select(0, numbers).to(patches.dtype).index_add_(0, seeing, patches)
    seats, coarse = candidates.seats(rows, len(images)), gating.decisions.detach() > 0.5
    both = both and gating.decisions.requires_grad and execution != "packed"
    return Tokens(
        x=vit.norm_pre(vit.pos_drop(x)),
        activity=None if execution == "packed" else activity.flatten()[rows],
        area=candidates.areas(rows.device)[numbers],
        where=_seated(seats, candidates.covering(coarse, gating.blocks)),
        layout=Layout(lengths, x.device),
        other=_seated(seats, candidates.covering(~coarse)) if both else None,
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
    soft = candidates.activity(gating.soft.detach(), gating.blocks)
    if execution == "levelled":
        return choose_levelled(active, soft)
    # Inactive tokens are there for their gradient.
    return choose_trimmed(active, soft, margin if gating.decisions.requires_grad else 1.0)


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
