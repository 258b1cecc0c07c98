"""The setting of a reducer that meets a budget, so that methods are compared at the same MACs."""

from typing import Any

import torch
from torch import nn

from ..core.macs import classifier_macs, encoder_macs, token_counts, vit_macs
from ..gating.rules import make_rule
from ..reducers.base import Reducer
from ..reducers.registry import make_reducer
from .calibrate import nearest_to_budget
from .msvit import MSViT


def fit_reducer(name: str, vit: nn.Module, share: float, tokens: int | None = None, **settings: Any) -> dict[str, Any]:
    """Return settings with which a reducer's MACs come as near as they can to a share of the dense backbone's.

    What is turned is `keep`; ToMe's is `r`, and a grid's the block at which it acts, so that these two meet a budget
    only roughly.

    Args:
        tokens: That enter the first block, prefix tokens included; None: of the backbone's own picture size.
        settings: Others of the reducer, which stay as they are.
    """
    entering = torch.tensor([tokens or vit.num_prefix_tokens + vit.patch_embed.num_patches])
    if name == "tome":
        turned = [{"r": r} for r in range(int(entering) // 2 - 1, 0, -1)]
    elif name == "grid":
        turned = [{"layers": [layer]} for layer in range(len(vit.blocks))]
    else:
        turned = [{"keep": k / 200} for k in range(10, 200)]

    def macs(choice: dict[str, Any]) -> float:
        return _macs(vit, make_reducer(name, vit, **settings | choice), entering)

    return settings | nearest_to_budget(turned, macs, share * vit_macs(vit, entering).item())


@torch.no_grad()
def _macs(vit: nn.Module, reducer: Reducer, entering: torch.Tensor) -> float:
    """Return the MACs of so many tokens, or of a picture where counts depend on it."""
    if not reducer.adaptive:
        counts = token_counts(len(vit.blocks), entering, reducer)
        return (encoder_macs(vit, entering, counts, reducer) + classifier_macs(vit, counts[-1, 1])).item()
    model = MSViT(vit, gate=make_rule("fine"), reducer=reducer).eval()
    return model.run(torch.zeros(1, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)).macs.item()
