"""The least precision in which sums and decisions are made."""

import torch
from torch import Tensor


def in_full(x: Tensor) -> Tensor:
    """Return float64 as it is, and all else in float32."""
    return x if x.dtype == torch.float64 else x.float()
