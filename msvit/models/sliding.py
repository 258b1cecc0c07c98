"""Dense tasks on large pictures: windows that overlap, one gate for all of them."""

import torch
from torch import Tensor

from .msvit import MSViT, Result


@torch.no_grad()
def slide(model: MSViT, images: Tensor, window: int, stride: int, mask: Tensor | None = None) -> Result:
    """Evaluate through windows of the size that the model was trained with: logits are means over windows.

    The gate sees one region at a time, so that it decides once for the whole picture, and all windows follow.

    Args:
        window: Side in pixels; a multiple of the coarse patch, with more than two scales of the largest one.
        stride: From a window to the next, likewise. The last one ends with the last such patch of the picture.
        mask: Decisions instead of the gate's, as in `MSViT.run`, for all regions of the picture.
    """
    patch = model.coarse_patch * model.scales[-1] // model.scale
    if window % patch or stride % patch or not 0 < stride <= window:
        raise ValueError(
            f"window={window}, stride={stride}: both are multiples of the coarse patch of {patch} px, "
            "and the stride is not the larger one"
        )
    model.check(images)
    height, width = images.shape[-2:]
    if window == patch > model.coarse_patch and (height % patch or width % patch):
        raise ValueError(
            f"window={window} holds one token of the largest scale, and at the border of a picture of {height} x "
            f"{width} px there is no room for one; use windows of {2 * patch} px or more"
        )
    gating = model.decide(images, mask)
    whole = [u > 0.5 for u in gating.undivided]
    total = images.new_zeros(len(images), model.num_classes, height, width)
    count = images.new_zeros(height, width)
    tokens, macs = 0, model.gate_macs([u.sum((1, 2)) for u in whole], (height, width)) if mask is None else 0
    for y in _starts(height, window, stride, patch):
        for x in _starts(width, window, stride, patch):
            inside = [_cut(u, model.coarse_patch * 2**level, y, x, window) for level, u in enumerate(whole)]
            seen = model.run(images[..., y : y + window, x : x + window], inside)
            total[..., y : y + window, x : x + window] += seen.logits
            count[y : y + window, x : x + window] += 1
            tokens, macs = tokens + seen.tokens, macs + seen.macs
    return Result(
        logits=total / count,
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


def _starts(side: int, window: int, stride: int, patch: int) -> list[int]:
    """Return where windows begin along a side, all at whole patches; the last one may reach beyond its end."""
    last = max(-(-side // patch) * patch - window, 0)
    return sorted({*range(0, last, stride), last})
