"""The setting of a reducer that meets a budget, so that methods are compared at the same MACs."""

import math
from typing import Any

import torch
from torch import nn

from ..core.macs import classifier_macs, encoder_macs, token_counts, vit_macs
from ..data.scenes import Scenes
from ..gating.rules import make_rule
from ..reducers.base import Reducer
from ..reducers.registry import make_reducer
from .calibrate import nearest_to_budget
from .msvit import MSViT


def fit_reducer(
    name: str,
    vit: nn.Module,
    share: float,
    tokens: int | None = None,
    images: torch.Tensor | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Return settings with which a reducer's MACs come as near as they can to a share of the dense backbone's.

    What is turned is `keep`; ToMe's is `r`, and a grid's the block at which it acts, so that these meet a budget only
    roughly. DiffRate's is `target`, at which its rates begin and to which they are trained. ALGM's is its threshold,
    and what it costs depends on the pictures and on what the backbone has learned.

    Args:
        tokens: That enter the first block, prefix tokens included; None: of the backbone's own picture size.
        images: Normalised, on which a method is measured whose tokens depend on the picture; by default, scenes.
        settings: Others of the reducer, which stay as they are.
    """
    entering = torch.tensor([tokens or vit.num_prefix_tokens + vit.patch_embed.num_patches])
    if name == "tome":
        turned = [{"r": r} for r in range(int(entering) // 2 - 1, 0, -1)]
    elif name in ("grid", "strided_convolution"):
        turned = [{"layers": [layer]} for layer in range(len(vit.blocks))]
    elif name == "algm":
        turned = [{"threshold": k / 1000} for k in range(-1000, 1002)]
    elif name == "diffrate":
        least = make_reducer(name, vit, **settings | {"target": 1.0}).least
        turned = [{"target": k / 200} for k in range(math.ceil(200 * least), 201)]
    else:
        turned = [{"keep": k / 200} for k in range(10, 200)]

    def macs(choice: dict[str, Any]) -> float:
        return _macs(vit, make_reducer(name, vit, **settings | choice), entering, images)

    return settings | nearest_to_budget(turned, macs, share * vit_macs(vit, entering).item())


@torch.no_grad()
def _macs(vit: nn.Module, reducer: Reducer, entering: torch.Tensor, images: torch.Tensor | None) -> float:
    """Return the MACs of so many tokens, or those of pictures where counts depend on them."""
    if not reducer.adaptive:
        counts = token_counts(len(vit.blocks), entering, reducer)
        return (encoder_macs(vit, entering, counts, reducer) + classifier_macs(vit, counts[-1, 1])).item()
    model = MSViT(vit, gate=make_rule("fine"), reducer=reducer).eval()
    if images is None:
        scenes = Scenes(2, vit.patch_embed.img_size)
        grey = torch.stack([scenes[i][0] for i in range(2)]).mean(1, keepdim=True)
        images = grey.expand(-1, vit.patch_embed.proj.in_channels, -1, -1)
    return model.run(images.to(model.cut.device)).macs.mean().item()
