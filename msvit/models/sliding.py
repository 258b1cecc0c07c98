"""Dense tasks on large pictures: windows that overlap, one gate for all of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_images
from .msvit import MSViT, Result


@torch.no_grad()
def slide(model: MSViT, images: Tensor, window: int, stride: int, mask: Tensor | None = None) -> Result:
    """Evaluate through windows of the size that the model was trained with: logits are means over windows.

    The gate sees one region at a time, so that it decides once for the whole picture, and all windows follow.

    Args:
        window: Side in pixels; a multiple of the coarse patch, with more than two scales of the largest one.
        stride: From a window to the next, likewise. The last one ends where the picture does.
        mask: Decisions instead of the gate's, as in `MSViT.run`, for all regions of the picture.
    """
    patch = model.coarse_patch * model.scales[-1] // model.scale
    if window % patch or stride % patch or not 0 < stride <= window:
        raise ValueError(
            f"window={window}, stride={stride}: both are multiples of the coarse patch of {patch} px, "
            "and the stride is not the larger one"
        )
    check_images(images, model.vit.patch_embed.proj.in_channels, 1)
    height, width = images.shape[-2:]
    images = F.pad(images, (0, -width % patch, 0, -height % patch))
    gating, size = model.decide(images, mask), images.shape[-2:]
    whole = [u > 0.5 for u in gating.undivided]
    images = F.pad(images, (0, max(0, window - size[1]), 0, max(0, window - size[0])))
    frame = images.shape[-2:]
    masks = [
        F.pad(u, (0, w - u.shape[2], 0, h - u.shape[1]), value=True)
        for u, (h, w) in zip(whole, model.grids(frame), strict=True)
    ]
    total = images.new_zeros(len(images), model.num_classes, *images.shape[-2:])
    count = images.new_zeros(images.shape[-2:])
    tokens, macs = 0, model.gate_macs([u.sum((1, 2)) for u in whole], size) if mask is None else 0
    for y in _starts(frame[0], window, stride):
        for x in _starts(frame[1], window, stride):
            inside = [_cut(u, frame[0] // u.shape[1], y, x, window) for u in masks]
            seen = model.run(images[..., y : y + window, x : x + window], inside)
            total[..., y : y + window, x : x + window] += seen.logits
            count[y : y + window, x : x + window] += 1
            tokens, macs = tokens + seen.tokens, macs + seen.macs
    logits = (total / count)[..., :height, :width]
    return Result(
        logits=logits,
        gates=gating.nested[0],
        scores=gating.scores,
        coarse=whole[0],
        tokens=tokens,
        macs=macs,
        gating=gating,
    )


def _cut(regions: Tensor, side: int, y: int, x: int, window: int) -> Tensor:
    """Return the regions `[B, h, w]`, `side` pixels wide, that lie in a window at (y, x)."""
    return regions[:, y // side : (y + window) // side, x // side : (x + window) // side]


def _starts(side: int, window: int, stride: int) -> list[int]:
    return sorted({*range(0, side - window, stride), side - window})
