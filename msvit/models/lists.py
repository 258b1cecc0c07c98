"""Pictures of different sizes as one batch: tokens at each one's own size, packed into one pass through the backbone.

This is NaViT's way (Dehghani et al. 2023, "Patch n' Pack") with mixed-scale tokens: no picture is resized or padded to
another's size, and none depends on its neighbours.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import check_masks
from ..core.fast_linear import fast_linear
from ..core.tokens import Tokens, join_pictures
from .result import Result
from .tokenizer import Gating


def run_list(
    model: nn.Module, pictures: Sequence[Tensor], masks: Sequence | None, execution: str | None, check: bool
) -> Result:
    """Return what a `MSViT` makes of pictures `[c, H, W]`; arguments as of its `run`, a mask for each picture."""
    _check_list(pictures, masks)
    gatings, parts = _tokenize_list(model, pictures, masks, execution, check)
    tokens, sizes = join_pictures(parts), [picture.shape[-2:] for picture in pictures]
    with fast_linear(model.fast_cpu):
        encoded = model.through_blocks(tokens)
        logits = _logits(model, encoded.final, sizes)
    entering = tokens.active_counts()
    each = zip(gatings, sizes, entering.split(1), encoded.counts.split(1, 2), strict=True)
    return Result(
        logits=logits,
        gates=[gating.nested[0][0] for gating in gatings],
        scores=None if gatings[0].scores is None else [gating.scores[0] for gating in gatings],
        coarse=[gating.undivided[0][0].detach() > 0.5 for gating in gatings],
        tokens=entering,
        macs=torch.cat([model.spent(*of_picture, masks is None) for of_picture in each]),
        counts=encoded.counts,
        stages=encoded.stages,
        final=encoded.final,
        gating=gatings,
    )


def _tokenize_list(
    model: nn.Module, pictures: Sequence[Tensor], masks: Sequence | None, execution: str | None, check: bool
) -> tuple[list[Gating], list[Tokens]]:
    """Return what was decided about each picture, and its tokens; those of the same size are embedded together."""
    alike, found = defaultdict(list), {}
    for i, picture in enumerate(pictures):
        alike[tuple(picture.shape)].append(i)
    for numbers in alike.values():
        images = torch.stack([pictures[i] for i in numbers])
        model.check(images, finite=check)
        given = None if masks is None else _stacked([masks[i] for i in numbers], model.grids(images.shape[-2:]))
        gating = model.decide(images, given)
        with fast_linear(model.fast_cpu):
            tokens = model.tokenize(images, gating, execution)
        for place, i in enumerate(numbers):
            found[i] = gating.picture(place), tokens.picture(place)
    gatings, parts = zip(*(found[i] for i in range(len(pictures))), strict=True)
    return list(gatings), list(parts)


def _stacked(masks: list[Tensor | Sequence[Tensor]], grids: list[tuple[int, int]]) -> list[Tensor]:
    """Return the masks of pictures of one size as those of a batch, for regions of each size."""
    checked = [check_masks(mask, 1, grids) for mask in masks]
    levels = zip(*checked, strict=True)
    return [torch.stack([mask.reshape(grid) for mask in level]) for level, grid in zip(levels, grids, strict=True)]


def _logits(model: nn.Module, final: Tokens, sizes: list[tuple[int, int]]) -> Tensor | list[Tensor]:
    """Return logits `[B, K]`, or of a dense head those of each picture `[K, H, W]`."""
    if not model.head.dense:
        return model.head.logits(model.vit, final, None)
    return [model.head.logits(model.vit, final.picture(i), size)[0] for i, size in enumerate(sizes)]


def _check_list(pictures: Sequence[Tensor], masks: Sequence | None):
    if not len(pictures):
        raise ValueError("an empty list; give at least one picture")
    for i, picture in enumerate(pictures):
        if not isinstance(picture, Tensor) or picture.dim() != 3:
            got = list(picture.shape) if isinstance(picture, Tensor) else type(picture).__name__
            raise ValueError(f"picture {i} of the list is {got}; expected a float tensor [c, H, W]")
    if masks is not None and (not isinstance(masks, list | tuple) or len(masks) != len(pictures)):
        got = f"{len(masks)} masks" if isinstance(masks, list | tuple) else type(masks).__name__
        raise ValueError(f"{got} for a list of {len(pictures)} pictures; give a list with a mask [h, w] for each")
