"""Errors for bad input that name the value, what was expected and what to do."""

import torch
from torch import Tensor


def check_images(images: Tensor, channels: int, patch: int, finite: bool = False):
    """Pictures `[B, channels, H, W]` of floats, not empty, both sides multiples of the coarse patch."""
    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"pictures are {got}; expected a float tensor [B, {channels}, H, W]")
    b, c, height, width = images.shape
    if b == 0:
        raise ValueError("an empty batch; give at least one picture")
    if c != channels:
        raise ValueError(f"pictures have {c} channels, the backbone takes {channels}")
    if height % patch or width % patch or not height or not width:
        fits = [f"{max(side // patch, 1) * patch} or {(side // patch + 1) * patch}" for side in (height, width)]
        raise ValueError(
            f"a picture of {height} x {width} px is no whole number of coarse patches of {patch} px; "
            f"resize the height to {fits[0]} and the width to {fits[1]}"
        )
    if finite and not (ok := images.isfinite().flatten(1).all(1)).all():
        raise ValueError(f"pictures {(~ok).nonzero()[:, 0].tolist()} of the batch have NaN or infinite pixels")


def check_mask(mask: Tensor, pictures: int, grid: tuple[int, int]):
    """Decisions: bool `[h, w]` or `[B, h, w]`."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"the mask is {got}; expected a bool tensor, True = coarse (for scores use `scores > 0`)")
    if tuple(mask.shape) not in (tuple(grid), (pictures, *grid)):
        raise ValueError(
            f"the mask has shape {list(mask.shape)}; expected {list(grid)} for all pictures "
            f"or {[pictures, *grid]} for each"
        )
