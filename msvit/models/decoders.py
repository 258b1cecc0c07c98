"""Decoders in the manner of Segmenter (Strudel et al. 2021): from tokens, in any layout, to the logits of each.

A decoder is called `decoder(x [T, C], weight [T] or None, layout)` on patch tokens alone and returns `[T, K]`.
"""

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..core import macs as measure
from ..core.attention import Layout, attend
from ..core.blocks import after_attention, after_mlp, before_attention


class LinearDecoder(nn.Module):
    """Logits of each token by one linear layer."""

    def __init__(self, width: int, classes: int, heads: int):
        super().__init__()
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor, weight: Tensor | None, layout: Layout) -> Tensor:
        """Logits `[T, K]` of rows `[T, C]`."""
        return self.head(x)

    def macs(self, tokens: Tensor) -> Tensor:
        return tokens * measure.linear_macs(self)


class MaskTransformer(nn.Module):
    """Class embeddings c_k pass through two blocks together with a picture's tokens x_i, and meet them again:

        mask_ik = LayerNorm_k( x_i / |x_i| . c_k / |c_k| )

    The weight says how often a token counts as a key, as in the backbone; a class embedding counts once.
    """

    def __init__(self, width: int, classes: int, heads: int, depth: int = 2):
        super().__init__()
        self.classes = nn.Parameter(torch.empty(classes, width))
        self.blocks = nn.ModuleList(Block(width, heads, qkv_bias=True) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.mask_norm = nn.LayerNorm(classes)
        self.apply(_small_weights)
        nn.init.trunc_normal_(self.classes, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """As for the backbone's class token."""
        return {"classes"}

    def forward(self, x: Tensor, weight: Tensor | None, layout: Layout) -> Tensor:
        """Logits `[T, K]` of rows `[T, C]`."""
        k, b = len(self.classes), len(layout.lengths)
        joint = Layout([n + k for n in layout.lengths], x.device)
        first = joint.ends[:-1, None] + torch.arange(k, device=x.device)
        place = torch.arange(len(x), device=x.device) + k * (layout.picture + 1)
        z = x.new_zeros(len(x) + b * k, x.shape[1]).index_copy(0, place, x)
        z = z.index_copy(0, first.flatten(), self.classes.to(x.dtype).repeat(b, 1))
        if weight is not None:
            weight = weight.new_ones(len(z)).index_copy(0, place, weight)
        for block in self.blocks:
            h, *qkv = before_attention(block, z)
            z = after_attention(block, z, h, attend(joint, *qkv, weight), joint)
            z = after_mlp(block, z, joint)
        z = F.normalize(self.norm(z), dim=-1)
        return self.mask_norm(_products(layout, z[place], z[first]))

    def macs(self, tokens: Tensor) -> Tensor:
        k, width = self.classes.shape
        rows = tokens + k
        return rows * measure.linear_macs(self.blocks) + len(self.blocks) * 2 * rows**2 * width + tokens * k * width


def _products(layout: Layout, rows: Tensor, classes: Tensor) -> Tensor:
    """Each row `[T, C]` times its own picture's class embeddings `[B, K, C]`, `[T, K]`."""
    if layout.uniform or rows.is_cuda:
        return layout.unpad(layout.pad(rows) @ classes.transpose(1, 2))
    return torch.cat([part @ own.T for part, own in zip(rows.split(layout.lengths), classes, strict=True)])


def _small_weights(module: nn.Module):
    """As timm initialises a vision transformer."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


DECODERS = {"linear": LinearDecoder, "mask": MaskTransformer}
