"""DiffRate (Chen et al. 2023, "DiffRate: Differentiable Compression Rate for Efficient Vision Transformers")."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..checks import in_interval
from ..core.macs import block_costs, classifier_macs, embedding_macs
from ..core.precision import in_full
from ..core.sampling import with_gradient_of
from ..core.tokens import Tokens
from .base import Reducer, Teacher, merge, ranked, top_rows, union
from .tome import most_similar

GMACS_OF_DEIT_SMALL = 4.6


class DiffRate(Reducer):
    """Learns how many tokens each block prunes and how many it merges, numbers that hold for all pictures.

    Between attention and MLP, patch tokens are ranked by the class token's attention, mean over the heads. The first P
    are kept; of these each behind the first M goes into the one among them that is most similar, by the cosine of the
    tokens. A merged token is the plain mean of its parts. Its size, how often it counts as a key from then on, is
    s_j + sum_i max(cos_ij, 0) s_i. Prefix tokens take no part. A block leaves min(n, P, M) of n patch tokens.

    Of N patches the candidates are K_c = N, N - g, N - 2 g … > 0, with learned probabilities rho = softmax(theta), for
    pruning and for merging each their own, in each block:

        P, M = ceil(E),   E = sum_c rho_c K_c,   p_r = sum_c rho_c [K_c > r]

    p_r is how likely the token of rank r = 0, 1, … stays. While theta trains, nothing is discarded: the masks [r < P]
    and [r < M] with the gradient of p_r multiply from block to block, as the policy of attention (`attend_by_policy`).
    A mask takes part where its block removes something, and what was removed has no rank. With n_l the number that
    block l leaves and F the MACs of all blocks by n,

        L = L_task + lambda (F / F_dense - target)²,   dn_l / dE = 1 for both of a block, whichever of them binds.

    In evaluation, and where theta is frozen (`reducer_lr=0`), tokens are really discarded and merged. The authors learn
    theta for 3 epochs at a rate of 0.01 beside a frozen backbone, which is trained on, if at all, at fixed numbers.

    What differs from the authors' code:
      * It computes one function in training and another in evaluation: while training, s_i cos_ij is at least 1. Here
        it is that of evaluation in both; a cosine below 0, which would make a size negative, counts 0.
      * Its target is in GMACs and lambda 5. Here it is a share of the dense backbone's MACs, which means the same at
        every size, and lambda = 5 x 4.6², the same loss for DeiT-S with its 4.6 GMACs. The products that the reducer
        adds are part of F, without a gradient.
      * Its rho begin uniform, with half of the tokens in every block. Here the numbers begin at the target: each block
        leaves the same share of what it finds, half of the others are pruned and half merged, and rho is of the
        greatest entropy that has E = P - 1/2.
      * It sorts the tokens; here they stay in the picture's order, which changes nothing.
    P and M are numbers, not shares: a picture that enters with fewer tokens, behind a gate, loses fewer or none.

    Args:
        target: The share of the dense backbone's MACs, in (0, 1].
        layers: By default every block but the first.
        granularity: g.
        numbers: P and M of all layers to begin with in place of the target's, as in [[60, 40], [50, 30]]. The authors
            publish such lists, the class token counted.
        macs_weight: lambda.
    """

    lossless = False
    needs = "class"

    def __init__(
        self,
        vit: nn.Module,
        target: float = 0.65,
        layers: Sequence[int] | None = None,
        granularity: int = 4,
        numbers: Sequence[Sequence[int]] | None = None,
        macs_weight: float = 5 * GMACS_OF_DEIT_SMALL**2,
    ):
        super().__init__(vit, range(1, len(vit.blocks)) if layers is None else layers)
        if getattr(vit, "cls_token", None) is None:
            raise ValueError("DiffRate ranks by the class token, and this backbone has no class token; use pitome")
        if not isinstance(granularity, int) or not 1 <= granularity <= self.patches:
            raise ValueError(f"granularity={granularity!r}: use a whole number of tokens, 1 to {self.patches}")
        self.target, self.granularity = in_interval("target", target, "(0, 1]"), granularity
        self.macs_weight, self.lowest = macs_weight, min((self.patches - 1) % granularity + 2, self.patches)
        with torch.device("cpu"):  # also where the model has no values
            self._measure(vit)
            begin = torch.tensor(self._at_target() if numbers is None else self._checked(numbers))
            self.rates = nn.Parameter(tilted(begin, self.candidates))  # theta, [2, layers, candidates]
            self._refresh()

    def _measure(self, vit: nn.Module):
        """Note what the candidates are, and what a backbone's parts cost."""
        self.register_buffer("candidates", torch.arange(self.patches, 0, -self.granularity), persistent=False)
        self.register_buffer("costs", torch.tensor([block_costs(block) for block in vit.blocks]), persistent=False)
        one, two = (classifier_macs(vit, torch.tensor(n)).item() for n in (1, 2))
        embedding = embedding_macs(vit, torch.tensor(self.prefix + self.patches)).item()
        self.outside = [embedding + 2 * one - two, two - one]  # MACs at no token, and for each that is left
        self.dense = self._blocks_macs(self.candidates[:1].expand(len(self.layers))).item()
        self._limit([[self.lowest] * len(self.layers)] * 2)
        self.least = self._share().item()  # the least target
        if self.target < self.least:
            raise ValueError(
                f"target={self.target} cannot be met: layers={list(self.layers)} and granularity={self.granularity} "
                f"leave a share of {self.least:.3f} of the dense MACs or more; use at least that"
            )

    def no_weight_decay(self) -> set[str]:
        return {"rates"}

    @property
    def learning(self) -> bool:
        """Whether masks stand for what is removed, so that the rates have a gradient."""
        return self.training and self.rates.requires_grad

    def expected(self) -> Tensor:
        """Return E, float64 `[2, layers]`, of pruning and merging."""
        return (self.rates.double().softmax(-1) * self.candidates).sum(-1)

    def numbers(self) -> Tensor:
        """Return P and M, int64 `[2, layers]`; an expectation 1e-4 above a whole number is that number."""
        return (self.expected().detach() - 1e-4).ceil().long()

    def share(self) -> Tensor:
        """Return F / F_dense at the backbone's own number of patches, with the gradient of the expected numbers."""
        self._refresh()
        expected = self.expected()
        return self._share((expected - expected.detach()).sum(0))

    def loss(self, result, teacher: Teacher | None = None) -> dict[str, Tensor]:
        return {"budget": self.macs_weight * (self.share() - self.target).square()} if self.learning else {}

    def enter(self, tokens: Tokens) -> Tokens:
        self._refresh()
        if not self.learning:
            return tokens
        every = torch.ones_like(tokens.area)
        return replace(tokens, activity=every if tokens.activity is None else tokens.activity, policy=every)

    def after_attention(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        if tokens.policy is None:
            return super().after_attention(layer, tokens, seen)
        return self._hide(layer, tokens, seen.detach())

    def count(self, layer: int, tokens: Tensor) -> Tensor:
        self._refresh()
        return self.prefix + self._left(layer, tokens - self.prefix)[1]

    def macs(self, layer: int, tokens: Tensor) -> Tensor:
        pruned, merged = self._left(layer, tokens - self.prefix)
        return (tokens + (pruned - merged) * merged) * self.width  # the class token's query, and similarities

    def reduce(self, layer: int, tokens: Tokens, seen: Tensor | None) -> Tokens:
        pruned, merged = self._lengths(layer, tokens.layout.lengths)
        scores = seen.detach().masked_fill(tokens.layout.position < self.prefix, torch.inf)
        if pruned != tokens.layout.lengths:
            rows = top_rows(tokens.layout, scores, pruned)
            tokens, scores = tokens.select(rows, pruned), scores[rows]
        if merged == pruned:
            return tokens
        source, target, added = self._matched(tokens, ranked(tokens.layout, scores), merged, pruned)
        kept = torch.ones(len(tokens.x), dtype=torch.bool, device=source.device).index_fill(0, source, False)
        number = kept.cumsum(0) - 1
        size = tokens.sizes.index_copy(0, source, added)
        into = number.index_copy(0, source, number[target])
        return merge(replace(tokens, size=size), into, merged, weight=torch.ones_like(size))

    def _hide(self, layer: int, tokens: Tokens, seen: Tensor) -> Tokens:
        """Return all tokens, those that `reduce` would remove with an activity of 0."""
        layout, every = tokens.layout, torch.arange(len(tokens.x), device=seen.device)
        active, counts = tokens.activity.detach() > 0.5, tokens.active_counts().tolist()
        pruned, merged = self._lengths(layer, counts)
        if merged == counts:
            return tokens
        scores = seen.masked_fill(~active, -torch.inf).masked_fill(layout.position < self.prefix, torch.inf)
        order = ranked(layout, scores)
        places = torch.arange(order.shape[1], device=seen.device).expand_as(order)
        rank = layout.unpad(torch.empty_like(order).scatter(1, order, places))
        n, first, last = (torch.tensor(part, device=seen.device)[layout.picture] for part in (counts, pruned, merged))
        stays = active & (rank < first)  # is not pruned
        masks = (
            self._mask(0, layer, rank, stays).where(active & (first < n), 1.0),
            self._mask(1, layer, rank, rank < last).where(stays & (last < first), 1.0),
        )
        keep = masks[0] * masks[1]
        source, target, added = self._matched(tokens, order, merged, pruned)
        moved, gone = every.index_copy(0, source, target), active & ~stays
        where = moved[tokens.where.clamp(min=0)]
        if tokens.centre is not None:
            box = union(tokens.box, moved, len(every)).where((moved == every)[:, None], tokens.box)
            tokens = replace(tokens, box=box, centre=self._merged(tokens, tokens.centre, active, source, target))
        return replace(
            tokens,
            x=self._merged(tokens, tokens.x, active, source, target),
            activity=tokens.activity * keep,
            policy=tokens.policy * keep,
            area=tokens.area.index_add(0, target, tokens.area[source]).index_fill(0, source, 0.0),
            where=where.masked_fill((tokens.where < 0) | gone[where], -1),
            size=tokens.sizes.index_add(0, target, added),
        )

    def _mask(self, kind: int, layer: int, rank: Tensor, stays: Tensor) -> Tensor:
        """Return 1 for what stays and 0 for the rest, `[T]`, with the gradient of p by the rank with prefix tokens."""
        kept = self.rates[kind, self.layers.index(layer)].double().softmax(-1).cumsum(-1)
        place = (self.patches - 1 - rank + self.prefix) // self.granularity
        soft = kept[place.clamp(0, len(kept) - 1)].to(torch.promote_types(self.rates.dtype, torch.float32))
        return with_gradient_of(soft, stays.to(soft.dtype))

    def _matched(self, tokens: Tokens, order: Tensor, merged: list[int], pruned: list[int]) -> tuple[Tensor, ...]:
        """Return the rows to merge, each one's target, and what is added to the target's size."""
        source, target, cosine = most_similar(tokens.x, tokens.layout, order, self.prefix, merged, pruned)
        return source, target, tokens.sizes[source] * cosine.clamp(min=0)

    @staticmethod
    def _merged(tokens: Tokens, rows: Tensor, active: Tensor, source: Tensor, target: Tensor) -> Tensor:
        """Return rows `[T, C]`, in targets the mean with their sources, weighted by the gate's part of the activity."""
        wide = in_full(rows)
        own = (tokens.activity.where(active, 1.0) / tokens.policy.where(active, 1.0)).to(wide.dtype)
        more = torch.zeros_like(own).index_add(0, target, own[source])
        sums = (wide * own[:, None]).index_add(0, target, wide[source] * own[source][:, None])
        return (sums / (own + more)[:, None]).where((more > 0)[:, None], wide).to(rows.dtype)

    def _refresh(self):
        """Read the numbers from the device, once for what follows."""
        self._limit(self.numbers().tolist())

    def _limit(self, numbers: list[list[int]]):
        unlimited = [[2**40 if n == self.patches else n for n in part] for part in numbers]  # all is no limit
        self._limits = dict(zip(self.layers, zip(*unlimited, strict=True), strict=True))

    def _left(self, layer: int, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many of so many patch tokens are left after pruning, and after merging."""
        prune, merge = self._limits[layer]
        pruned = patches.clamp(max=prune)
        return pruned, pruned.clamp(max=merge)

    def _lengths(self, layer: int, lengths: list[int]) -> list[list[int]]:
        return [(n + self.prefix).tolist() for n in self._left(layer, torch.tensor(lengths) - self.prefix)]

    def _blocks_macs(self, left: Tensor) -> Tensor:
        """Return a backbone's MACs, float64, if each of the layers leaves so many patch tokens `[layers]`."""
        acted = [sum(layer <= block for layer in self.layers) for block in range(self.depth)]
        left = left.double() + self.prefix
        after = torch.cat([left.new_full((1,), self.patches + self.prefix), left])[acted]
        before = torch.cat([left.new_full((1,), self.patches + self.prefix), after[:-1]])
        rows, keys, mlp = self.costs.double().T
        blocks = before * rows + before**2 * keys + after * mlp
        return self.outside[0] + self.outside[1] * after[-1] + blocks.sum()

    def _share(self, change: Tensor | float = 0.0) -> Tensor:
        """Return F / F_dense of the backbone's own number of patches; `change` is added to what each layer leaves."""
        n, left, own = torch.tensor(self.patches), [], 0
        for layer in self.layers:
            own += self.macs(layer, n + self.prefix).item()
            n = self._left(layer, n)[1]
            left.append(n.item())
        left = torch.tensor(left, dtype=torch.float64, device=self.costs.device)
        return (self._blocks_macs(left + change) + own) / self.dense

    def _at_target(self) -> list[list[int]]:
        """Return P and M whose MACs are nearest to the target, by halving the range of what a block leaves."""

        def numbers(share: float) -> list[list[int]]:
            merged = [max(self.lowest, round(self.patches * share ** (i + 1))) for i in range(len(self.layers))]
            before = [self.patches, *merged[:-1]]
            return [[-(-(b + m) // 2) for b, m in zip(before, merged, strict=True)], merged]

        def over(share: float) -> float:
            self._limit(numbers(share))
            return self._share().item() - self.target

        low, high = 0.0, 1.0
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (low, middle) if over(middle) > 0 else (middle, high)
        return numbers(min(low, high, key=lambda share: abs(over(share))))

    def _checked(self, numbers: Sequence[Sequence[int]]) -> list[list[int]]:
        least = self.candidates[-1].item()
        if [len(part) for part in numbers] != [len(self.layers)] * 2:
            raise ValueError(f"numbers={numbers}: two lists, P and M, for the layers {list(self.layers)}")
        if bad := [n for part in numbers for n in part if not isinstance(n, int) or not least <= n <= self.patches]:
            allowed = f"with granularity={self.granularity}, use {least} to {self.patches}"
            raise ValueError(f"numbers={numbers}: {bad[0]!r} of {self.patches} patch tokens; {allowed}")
        return [list(part) for part in numbers]


def tilted(numbers: Tensor, candidates: Tensor) -> Tensor:
    """Return logits t K_c, `[..., C]`, with which the expectation of the candidates is `numbers` - 1/2.

    As softmax these are the probabilities of the greatest entropy that have it. The least candidate is approached.
    """
    steps = (candidates - candidates[-1]).double()
    goal = (numbers - candidates[-1] - 0.5).double().clamp(min=1e-6)
    low, high = torch.full_like(goal, -50.0), torch.full_like(goal, 50.0)
    for _ in range(60):
        t = (low + high) / 2
        less = ((t[..., None] * steps).softmax(-1) * steps).sum(-1) < goal
        low, high = t.where(less, low), high.where(less, t)
    logits = (low + high)[..., None] / 2 * steps
    return (logits - logits.amax(-1, keepdim=True)).float()
