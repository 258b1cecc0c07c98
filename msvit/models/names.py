"""Which of timm's names MSViT takes as a backbone, found by building each of them without values."""

from typing import NamedTuple

import timm
import torch
from torch import nn

from ..checks import first_line
from ..core import backbone
from ..core.rotary import ROTARY_KINDS

TIMM_MODULES = ["vision_transformer", "deit", "eva"]  # of timm, whose names build a VisionTransformer or an Eva
BUILDING_ERRORS = (ValueError, TypeError, RuntimeError, AssertionError, NotImplementedError)


class BackboneName(NamedTuple):
    """A name of timm, what it builds, and why that is refused; an empty `refused` means that it works."""

    name: str
    patch: int
    size: str
    tokens: int
    positions: str
    refused: str = ""


def list_backbones(pattern: str = "*") -> list[BackboneName]:
    """Return what timm's names that match a pattern such as "*dinov3*" build.

    Names of other classes (Swin, convolutional networks …) are left out: none of them works.

    Raises:
        ValueError: If no name matches.
    """
    names = timm.list_models(pattern, module=TIMM_MODULES)
    if not names:
        others = len(timm.list_models(pattern))
        what = f"of its {others} names that match {pattern!r}, none is a plain vision transformer"
        what = what if others else f"timm has no name that matches {pattern!r}"
        raise ValueError(f"{what}; try '*dinov3*' or '*clip*'")
    return [_describe(name) for name in names]


def _describe(name: str) -> BackboneName:
    try:
        with torch.device("meta"):
            vit = timm.create_model(name, num_classes=0)
    except BUILDING_ERRORS as error:
        return BackboneName(name, 0, "", 0, "", f"timm cannot build it: {first_line(error)}")
    try:
        backbone.check_backbone(vit)
    except (ValueError, TypeError) as error:
        return BackboneName(name, 0, "", 0, "", str(error))
    height, width = vit.patch_embed.img_size
    tokens = vit.num_prefix_tokens + vit.patch_embed.num_patches
    return BackboneName(name, backbone.patch_size(vit), f"{height} x {width}", tokens, _positions(vit))


def _positions(vit: nn.Module) -> str:
    rope = getattr(vit, "rope", None)
    kinds = ["learned"] if vit.pos_embed is not None else []
    return ", ".join(kinds + ([f"rotary ({ROTARY_KINDS[type(rope)]})"] if rope is not None else [])) or "none"
