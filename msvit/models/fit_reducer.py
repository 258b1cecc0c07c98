"""The setting of a reducer that meets a budget, so that methods are compared at the same MACs."""

from typing import Any

import torch
from torch import nn

from ..core import macs as measure
from ..gating.rules import make_rule
from ..reducers.registry import Reducer, make_reducer
from .msvit import MSViT


def fit(name: str, vit: nn.Module, share: float, tokens: int | None = None, **settings: Any) -> dict[str, Any]:
    """Settings with which a reducer's MACs come as near as they can to a share of the dense backbone's.

    What is turned is `keep`; ToMe's is `r`, and a grid's the block at which it acts, so that these two meet a budget
    only roughly.

    Args:
        tokens: That enter the first block, prefix tokens included; None: of the backbone's own picture size.
        settings: Others of the reducer, which stay as they are.
    """
    entering = torch.tensor([tokens or vit.num_prefix_tokens + vit.patch_embed.num_patches])
    dense = measure.vit_macs(vit, entering).item()
    if name == "tome":
        knobs = [{"r": r} for r in range(1, int(entering) // 2)]
    elif name == "grid":
        knobs = [{"layers": [layer]} for layer in range(len(vit.blocks))]
    else:
        knobs = [{"keep": k / 200} for k in range(10, 200)]

    def miss(knob: dict[str, Any]) -> float:
        reducer = make_reducer(name, vit, **settings | knob)
        if name == "grid":
            macs = _measured(vit, reducer)
        else:
            counts = measure.plan(len(vit.blocks), entering, reducer)
            macs = measure.path_macs(vit, entering, counts, reducer).item()
        return abs(macs / dense - share)

    return settings | min(knobs, key=miss)


@torch.no_grad()
def _measured(vit: nn.Module, reducer: Reducer) -> float:
    """MACs on a picture: how many tokens a grid leaves is no function of how many there were."""
    model = MSViT(vit, gate=make_rule("fine"), reducer=reducer).eval()
    return model.run(torch.zeros(1, vit.patch_embed.proj.in_channels, *vit.patch_embed.img_size)).macs.item()
