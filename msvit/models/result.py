"""What a model made of a batch of pictures."""

from typing import NamedTuple

from torch import Tensor

from ..core.blocks import TokenStage
from ..core.tokens import Tokens
from .tokenizer import Gating


class Result(NamedTuple):
    """What `MSViT.run` computed; B pictures with h x w coarse regions each.

    Of a list of pictures of different sizes, gates, scores, coarse and gating are lists, and so are the logits of
    pixels.

    Attributes:
        logits: `[B, classes]`.
        gates: Soft m in [0, 1], `[B, h, w]`; while training a Gumbel sample that carries gradients.
        scores: The gate's logits without noise, `[B, h, w]`; None where a mask was given.
        coarse: The decisions, bool `[B, h, w]`. With more than two scales, which regions lie within one token, their
            own or a larger one; `gates` is the largest m of these.
        tokens: Active tokens per picture that enter the first block, prefix tokens included, int64 `[B]`.
        macs: Per picture, for the active tokens alone, gate and reducer included, float64 `[B]`.
        counts: Active tokens that each block's attention and MLP saw, int64 `[depth, 2, B]`.
        stages: Where each fine patch's token was, after the tokenizer and after each step of the reducer.
        final: The tokens after the last norm.
        gating: What was decided about regions of each size.
    """

    logits: Tensor
    gates: Tensor
    scores: Tensor | None
    coarse: Tensor
    tokens: Tensor
    macs: Tensor
    counts: Tensor | None = None
    stages: tuple[TokenStage, ...] = ()
    final: Tokens | None = None
    gating: Gating | None = None

    def picture(self, b: int) -> "Result":
        """Return what was made of one picture of a list, as of a batch of one."""
        rows = {name: getattr(self, name)[b][None] for name in ("logits", "gates", "coarse", "tokens", "macs")}
        scores = None if self.scores is None else self.scores[b][None]
        return Result(**rows, scores=scores, counts=self.counts[:, :, b : b + 1], gating=self.gating[b])
