"""ToMe (Bolya et al. 2023, "Token Merging: Your ViT But Faster")."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.attention import Layout
from ..core.tokens import Tokens
from .base import Reducer, merge


class ToMe(Reducer):
    """Merges the r most similar pairs of tokens in every block, between attention and MLP.

    Bipartite soft matching on the keys (mean over the heads): tokens with even numbers are in set A, those with odd
    ones in B; each of A has an edge to the most similar of B, and the r best edges merge. Tokens merge as the mean
    weighted by their sizes, and from then on a token of size s counts s times as a key (proportional attention).

    Prefix tokens never merge. Tokens keep the picture's order, where the paper's code puts set A before set B.

    Args:
        r: Tokens to lose in a layer, at most half of its patch tokens.
        layers: By default every block.
    """

    needs = "keys"

    def __init__(self, vit: nn.Module, r: int = 13, layers: Sequence[int] | None = None):
        super().__init__(vit, range(len(vit.blocks)) if layers is None else layers)
        if not isinstance(r, int) or r < 0:
            raise ValueError(f"r={r!r}: the tokens to merge in a layer are a whole number; use 0, 8, 13 …")
        self.r, self.key_width = r, vit.blocks[0].attn.head_dim

    def count(self, layer: int, tokens: Tensor) -> Tensor:
        return tokens - ((tokens - self.prefix) // 2).clamp(max=self.r)

    def macs(self, layer: int, tokens: Tensor) -> Tensor:
        return (tokens + 1) // 2 * (tokens // 2) * self.key_width if self.r else torch.zeros_like(tokens)

    def reduce(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        layout = tokens.layout
        lengths = self.lengths(layer, layout)
        if lengths == layout.lengths:
            return tokens
        merging = layout.pad((layout.position >= self.prefix).float()) > 0
        r = [old - new for old, new in zip(layout.lengths, lengths, strict=True)]
        target = match(layout.pad(seen), merging, torch.tensor(r, device=merging.device))
        stays = target == torch.arange(target.shape[1], device=target.device)
        number = (stays.cumsum(1) - 1).gather(1, target)
        into = layout.unpad(number) + Layout(lengths, target.device).ends[layout.picture]
        size = torch.ones_like(tokens.area) if tokens.size is None else tokens.size
        return merge(replace(tokens, size=size), into, lengths, weight=size)


@torch.no_grad()
def match(keys: Tensor, merging: Tensor, r: Tensor) -> Tensor:
    """Match softly in two sets: return the token into which each goes, `[B, N]`; its own number where it stays.

    Args:
        keys: `[B, N, D]`; similar is what has a large cosine. Of equals, the first.
        merging: `[B, N]`, the tokens that may merge.
        r: `[B]`, how many shall.
    """
    keys = F.normalize(keys if keys.dtype == torch.float64 else keys.float(), dim=-1)
    with torch.autocast(keys.device.type, enabled=False):
        similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    allowed = merging[:, ::2, None] & merging[:, None, 1::2]
    best, partner = similarity.masked_fill(~allowed, -torch.inf).max(2)
    order = best.sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(order.shape[1], device=order.device) < r[:, None]
    merged = torch.zeros_like(first).scatter(1, order, first)
    target = torch.arange(keys.shape[1], device=keys.device).repeat(len(keys), 1)
    target[:, ::2] = torch.where(merged, 2 * partner + 1, target[:, ::2])
    return target
