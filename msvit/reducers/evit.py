"""EViT (Liang et al. 2022, "Not All Patches are What You Need")."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..checks import in_interval
from ..core.attention import Layout
from ..core.tokens import Tokens
from .base import Keeping, merge, top_rows


class EViT(Keeping):
    """Keeps the tokens that the class token attends to, ceil(keep n) of n, and fuses the others: x = sum_i a_i x_i.

    a is the class token's attention, mean over the heads; as in the paper it is not normalised over the fused tokens,
    and the loss reaches queries and keys through it. The fused token is the picture's last, and competes with the
    others at the next layer.

    While training, the share that is kept falls from 1 to `keep` by a cosine, p being the share of the stage that is
    over, w = `warmup`, e = `ramp_end`:

        keep_p = 1 (p < w),   keep + (1 - keep) (1 + cos(pi (p - w) / (e - w))) / 2 (w <= p < e),   keep (p >= e)

    The defaults are what the authors take where a dense model is trained on; from scratch it is 10 and 110 of 300
    epochs, warmup=0.033 and ramp_end=0.367.

    Args:
        fuse: Off, the others are dropped.
        warmup: Until this share of the stage every token is kept.
        ramp_end: From this share of the stage on it is `keep`.
    """

    needs = "class"

    def __init__(
        self,
        vit: nn.Module,
        keep: float | Sequence[float] = 0.7,
        layers: Sequence[int] | None = None,
        fuse: bool = True,
        warmup: float = 0.0,
        ramp_end: float = 0.0,
    ):
        super().__init__(vit, keep, layers)
        if getattr(vit, "cls_token", None) is None:
            raise ValueError(
                "EViT ranks tokens by the class token's attention, and this backbone has no class token; use one that "
                "has, or power_bert, which ranks by the attention that tokens receive"
            )
        in_interval("warmup", warmup, "[0, 1]")
        in_interval("ramp_end", ramp_end, f"[{warmup}, 1]")
        self.fuse = self.lossless = fuse
        self.warmup, self.ramp_end, self._progress = warmup, ramp_end, 1.0

    def begin(self, progress: float):
        self._progress = progress

    def rate(self, layer: int) -> float:
        """Return the share of tokens that a layer keeps now."""
        keep, p = self.keep[layer], self._progress
        if not self.training or p >= self.ramp_end:
            return keep
        if p < self.warmup:
            return 1.0
        return keep + (1 - keep) * (1 + math.cos(math.pi * (p - self.warmup) / (self.ramp_end - self.warmup))) / 2

    def kept(self, layer: int, patches: Tensor) -> Tensor:
        return (patches.double() * self.rate(layer)).ceil().long()

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
        scores = seen.detach().masked_fill(layout.position < self.prefix, torch.inf)
        rows = top_rows(layout, scores, left)
        if not self.fuse:
            return tokens.select(rows, left)
        lengths = self.lengths(layer, layout)
        ends = Layout(lengths, rows.device).ends
        into = ends[1:][layout.picture] - 1  # the fused token
        kept = torch.zeros(len(tokens.x), dtype=torch.bool, device=rows.device).index_fill(0, rows, True)
        shift = Layout(left, rows.device).ends - ends
        number = torch.arange(len(rows), device=rows.device) - shift[:-1][layout.picture[rows]]
        # Attention has the activity as a factor already; merging multiplies by it.
        share = seen if tokens.activity is None else seen / tokens.activity
        weight = share.where(~kept, torch.ones_like(seen))
        return merge(tokens, into.index_copy(0, rows, number), lengths, weight, average=False)
