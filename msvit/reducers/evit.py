"""EViT (Liang et al. 2022, "Not All Patches are What You Need")."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.attention import Layout
from ..core.tokens import Tokens
from .base import Keeping, merge, top_rows


class EViT(Keeping):
    """Keeps the tokens that the class token attends to, and fuses the others into one: x = sum_i a_i x_i.

    a is the class token's attention, mean over the heads; as in the paper it is not normalised over the fused tokens.
    The fused token is the picture's last, and competes with the others at the next layer.

    Args:
        fuse: Off, the others are dropped.
    """

    needs = "class"

    def __init__(
        self,
        vit: nn.Module,
        keep: float | Sequence[float] = 0.7,
        layers: Sequence[int] | None = None,
        fuse: bool = True,
    ):
        super().__init__(vit, keep, layers)
        if getattr(vit, "cls_token", None) is None:
            raise ValueError(
                "EViT ranks tokens by the class token's attention, and this backbone has no class token; use one that "
                "has, or power_bert, which ranks by the attention that tokens receive"
            )
        self.fuse = self.lossless = fuse

    def count(self, layer: int, tokens: Tensor) -> Tensor:
        kept = super().count(layer, tokens)
        return kept + (kept < tokens).long() if self.fuse else kept

    def macs(self, layer: int, tokens: Tensor) -> Tensor:
        return tokens * self.width  # one more query, the class token's

    def reduce(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        layout = tokens.layout
        left = super().count(layer, torch.tensor(layout.lengths)).tolist()
        if left == layout.lengths:
            return tokens
        scores = seen.masked_fill(layout.position < self.prefix, torch.inf)
        rows = top_rows(layout, scores, left)
        if not self.fuse:
            return tokens.select(rows, left)
        lengths = self.lengths(layer, layout)
        ends = Layout(lengths, rows.device).ends
        into = ends[1:][layout.picture] - 1  # the fused token
        kept = torch.zeros(len(tokens.x), dtype=torch.bool, device=rows.device).index_fill(0, rows, True)
        shift = Layout(left, rows.device).ends - ends
        number = torch.arange(len(rows), device=rows.device) - shift[:-1][layout.picture[rows]]
        weight = seen.where(~kept, torch.ones_like(seen))
        return merge(tokens, into.index_copy(0, rows, number), lengths, weight, average=False)
