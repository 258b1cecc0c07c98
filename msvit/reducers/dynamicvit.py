"""DynamicViT (Rao et al. 2021, "DynamicViT: Efficient Vision Transformers with Dynamic Token Sparsification")."""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import in_interval
from ..core.attention import Layout
from ..core.macs import linear_macs
from ..core.precision import in_full
from ..core.sampling import add_logistic_noise, straight_through
from ..core.tokens import Tokens
from .base import Keeping, Reducer, Teacher, patch_rows, ranked


class Predictor(nn.Module):
    """How much a token is worth keeping, from itself and from the mean of all that are still kept.

    u = GELU(W LayerNorm(x)) = [u', u''],   z_i = [u'_i, sum_j D_j u''_j / sum_j D_j],   pi = softmax(MLP(z))
    """

    def __init__(self, width: int):
        super().__init__()
        self.local = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        half, quarter = width // 2, width // 4
        self.out = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(), nn.Linear(quarter, 2)
        )

    def forward(self, x: Tensor, layout: Layout, kept: Tensor) -> Tensor:
        """Return the logit of keeping, log pi_keep - log pi_drop, of patch tokens `[n, C]` with D = `kept` `[n]`."""
        local, rest = self.local(x).chunk(2, 1)
        kept = kept.to(rest.dtype)[:, None]
        mean = layout.sum(rest * kept) / layout.sum(kept).clamp(min=1e-6)
        out = in_full(self.out(torch.cat([local, mean.index_select(0, layout.picture)], 1)))
        return out[:, 0] - out[:, 1]


class DynamicViT(Keeping):
    """Learned predictors that drop tokens before some blocks; a dropped token never returns.

    Stage s = 1, 2, … is to leave rho_s = keep^s of the N patch tokens that entered the network. While training the
    decisions D are Gumbel-softmax samples with straight-through gradients that multiply from stage to stage. Of two
    classes they are D = [logit + logit(u) > 0] with the noise logit(u) = g_keep - g_drop, u uniform and g Gumbel. They
    are the policy of every block's attention (`attend_by_policy`, before the first stage all 1), and nothing is
    discarded. In evaluation the best int(N rho_s) tokens stay, one at least, or those above a threshold, of which each
    picture has its own number; packed execution discards the rest. A gate's decisions in front multiply into D.

        L = L_task + 2 L_ratio + 0.5 L_KL + 0.5 L_tokens,   L_ratio = mean over stages s, pictures of (rho_s - kept_s)²

    with the KL divergence of the dense teacher's prediction, and the mean squared distance of kept tokens to its own.

    Args:
        keep: The base rate; or rho_1, rho_2, … of all stages, as in [0.7, 0.49, 0.343].
        threshold: Keep what the predictor finds worth it with more than this probability, in place of the best.
    """

    lossless = False
    of_entered = True

    def __init__(
        self,
        vit: nn.Module,
        keep: float | Sequence[float] = 0.7,
        layers: Sequence[int] | None = None,
        threshold: float | None = None,
        ratio_weight: float = 2.0,
        kl_weight: float = 0.5,
        token_weight: float = 0.5,
    ):
        super().__init__(vit, keep, layers)
        if not isinstance(keep, Sequence):
            self.keep = {layer: keep ** (s + 1) for s, layer in enumerate(self.layers)}
        elif sorted(keep, reverse=True) != list(keep):
            raise ValueError(f"keep={keep} rises: these are shares of all tokens, and what is dropped does not return")
        if threshold is not None:
            in_interval("threshold", threshold, "(0, 1)")
        self.threshold, self.adaptive = threshold, threshold is not None
        self.needs_teacher = kl_weight > 0 or token_weight > 0
        self.weights = {"ratio": ratio_weight, "kl": kl_weight, "tokens": token_weight}
        self.predictors = nn.ModuleDict({str(layer): Predictor(self.width) for layer in self.layers})

    def enter(self, tokens: Tokens) -> Tokens:
        if self.training:
            every = torch.ones_like(tokens.area)
            return replace(tokens, activity=every if tokens.activity is None else tokens.activity, policy=every)
        lengths = tokens.layout.lengths if tokens.activity is None else tokens.active_counts().tolist()
        return replace(tokens, entered=lengths)

    def after_attention(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        return tokens

    def before_block(self, layer: int, tokens: Tokens) -> Tokens:
        rows = patch_rows(tokens.layout, self.prefix)
        layout = Layout([n - self.prefix for n in tokens.layout.lengths], rows.device)
        kept = tokens.x.new_ones(len(rows)) if tokens.activity is None else tokens.activity[rows]
        if not self.training and self.threshold is None and self.keep[layer] == 1:
            return tokens
        logits = self.predictors[str(layer)](tokens.x[rows], layout, kept)
        left = None if self.training or self.adaptive else self.count(layer, torch.tensor(tokens.entered)).tolist()
        keep = self._decide(logits, layout, kept, left)
        hard = keep.detach() > 0.5
        if not self.training and tokens.activity is None:
            mask = torch.ones_like(tokens.area, dtype=torch.bool).index_copy(0, rows, hard)
            lengths = (layout.sum(hard.long()) + self.prefix).tolist() if left is None else left
            return tokens.select(mask.nonzero()[:, 0], lengths)
        keep = keep.new_ones(len(tokens.x)).index_copy(0, rows, keep)
        policy = None if tokens.policy is None else tokens.policy * keep
        where = tokens.where.masked_fill(keep.detach()[tokens.where.clamp(min=0)] < 0.5, -1)
        return replace(tokens, activity=tokens.activity * keep, policy=policy, where=where)

    def _decide(self, logits: Tensor, layout: Layout, kept: Tensor, left: list[int] | None) -> Tensor:
        """Return 1 for the tokens to keep and 0 for the others, `[n]`; one at least per picture.

        Args:
            left: How many tokens to keep in each picture, prefix included; None leaves it to their logits.
        """
        present = kept.detach() > 0.5
        if self.training:
            soft = torch.sigmoid(add_logistic_noise(logits))
            keep = straight_through(soft)
            return keep + (_best(layout, soft.where(present, -1.0)) * (1 - keep)).detach()
        logits = logits.masked_fill(~present, -torch.inf)
        if left is None:
            above = torch.sigmoid(logits) > self.threshold
            return above.to(logits.dtype).maximum(_best(layout, logits))
        counts = torch.tensor(left, device=logits.device)[:, None] - self.prefix
        order = ranked(layout, logits)
        first = torch.arange(order.shape[1], device=order.device) < counts
        return layout.unpad(torch.zeros_like(first).scatter(1, order, first)).to(logits.dtype)

    def count(self, layer: int, tokens: Tensor) -> Tensor:
        return Reducer.count(self, layer, tokens) if self.adaptive else super().count(layer, tokens)

    def kept(self, layer: int, patches: Tensor) -> Tensor:
        return (patches.double() * self.keep[layer]).long().clamp(min=1).minimum(patches)

    def counts(self, layer: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.count(layer, tokens)
        return kept, kept

    def macs(self, layer: int, tokens: Tensor) -> Tensor:
        if self.threshold is None and self.keep[layer] == 1:
            return torch.zeros_like(tokens)
        return (tokens - self.prefix) * linear_macs(self.predictors[str(layer)])

    def loss(self, result, teacher: Teacher | None = None) -> dict[str, Tensor]:
        first, *stages = [stage.kept for stage in result.stages]
        gaps = [(goal - kept / first).square().mean() for goal, kept in zip(self.keep.values(), stages, strict=True)]
        terms = {"ratio": self.weights["ratio"] * torch.stack(gaps).mean()}
        if self.needs_teacher and teacher is None:
            raise ValueError("DynamicViT learns from a dense teacher; give it, or set kl_weight=0 and token_weight=0")
        if self.weights["kl"]:
            student, dense = (in_full(x).log_softmax(1) for x in (result.logits, teacher.logits))
            terms["kl"] = self.weights["kl"] * F.kl_div(student, dense, reduction="batchmean", log_target=True)
        if self.weights["tokens"]:
            terms["tokens"] = self.weights["tokens"] * token_distance(result.final, teacher.tokens)
        return terms


def token_distance(tokens: Tokens, dense: Tensor) -> Tensor:
    """Return the mean over kept tokens of (x - t)², t the mean of the dense tokens `[B, H_f, W_f, C]` under one."""
    seen = tokens.where >= 0
    rows, x = tokens.where[seen], in_full(tokens.x)
    sums = torch.zeros_like(x).index_add(0, rows, dense[seen].to(x.dtype))
    count = sums.new_zeros(len(sums)).index_add(0, rows, sums.new_ones(len(rows)))
    here = count > 0
    return (x[here] - sums[here] / count[here][:, None]).square().mean()


def _best(layout: Layout, scores: Tensor) -> Tensor:
    """Return 1 at the highest score of each picture, 0 elsewhere."""
    padded = layout.pad(scores, -torch.inf)
    best = torch.zeros_like(padded).scatter(1, padded.argmax(1, keepdim=True), 1.0)
    return layout.unpad(best)
