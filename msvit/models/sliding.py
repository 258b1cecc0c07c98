"""Dense tasks on large pictures: windows that overlap, one gate for all of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_images
from ..core.macs import gate_macs
from .msvit import MSViT, Result


@torch.no_grad()
def slide(model: MSViT, images: Tensor, window: int, stride: int, mask: Tensor | None = None) -> Result:
    """Evaluate through windows of the size that the model was trained with: logits are means over windows.

    The gate sees one region at a time, so that it decides once for the whole picture, and all windows follow.

    Args:
        window: Side in pixels; a multiple of the coarse patch.
        stride: From a window to the next, likewise. The last one ends where the picture does.
        mask: Decisions instead of the gate's, as in `MSViT.run`, for all regions of the picture.
    """
    patch = model.coarse_patch
    if window % patch or stride % patch or not 0 < stride <= window:
        raise ValueError(
            f"window={window}, stride={stride}: both are multiples of the coarse patch of {patch} px, "
            "and the stride is not the larger one"
        )
    check_images(images, model.vit.patch_embed.proj.in_channels, 1)
    (height, width), (h, w) = images.shape[-2:], model.grid(images.shape[-2:])
    images = model.pad(images)
    gating = model.decide(images, mask)
    coarse = gating.decisions > 0.5
    rows, columns = max(h, window // patch), max(w, window // patch)
    images = F.pad(images, (0, (columns - w) * patch, 0, (rows - h) * patch))
    padded = F.pad(coarse, (0, columns - w, 0, rows - h), value=True)
    total = images.new_zeros(len(images), model.num_classes, *images.shape[-2:])
    count = images.new_zeros(images.shape[-2:])
    tokens, macs = 0, gate_macs(model.gate, h * w) if mask is None else 0
    for y in _starts(rows * patch, window, stride):
        for x in _starts(columns * patch, window, stride):
            at = (slice(None), slice(y // patch, (y + window) // patch), slice(x // patch, (x + window) // patch))
            seen = model.run(images[..., y : y + window, x : x + window], padded[at])
            total[..., y : y + window, x : x + window] += seen.logits
            count[y : y + window, x : x + window] += 1
            tokens, macs = tokens + seen.tokens, macs + seen.macs
    logits = (total / count)[..., :height, :width]
    return Result(logits=logits, gates=gating.soft, scores=gating.scores, coarse=coarse, tokens=tokens, macs=macs)


def _starts(side: int, window: int, stride: int) -> list[int]:
    return sorted({*range(0, side - window, stride), side - window})
