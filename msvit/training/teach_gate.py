"""Teaching a gate alone: what it knows before the joint stage, or all that it knows in front of a frozen backbone.

A gate that starts at random decides at random, and the backbone learns to live with that before the gate has learned
anything. So the gate g is first regressed on what it costs a region to be coarse, c, with its sign turned, and then
made a decision of: g <- 1.5 (g − g_q) / std g, g_q being the quantile at which the share of coarse regions is right.

    detail:   c = log(d + 1e-4), d = mean (x − enlarge(average(x)))², what a coarse token does not see
    entropy:  c = the entropy of the region's grey values
    utility:  what the model itself loses, after a start with detail. With two random masks of a picture, a, a' the
              activities of their coarse tokens i, and the divergences K from the answer with all regions fine,
              −w Σ (a_i − a'_i) g(x_i) follows K(a) − K(a'); no label is needed. w is what the scores are
              worth by the same measure, and mean (g − g_start)² counts too, so that a gate goes as far from its start
              as the masks bear out: on photographs all regions together explain a few percent of a K

A quadtree has a gate for each size of regions, each with scores of its own, and decides from the largest regions down:
a share is one of the regions that are asked.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core.scales import activity_of, enlarge, spread, undivided
from ..core.tokens import patchify, shrink
from ..data.loaders import Loaders, set_epoch
from ..gating.rules import Entropy, Static
from ..models.msvit import MSViT
from ..progress import bar

SLOPE = 1.5
RATES = {"pixels": 3e-3, "filters": 1e-2}  # the regression's peak learning rate, by what the gate sees with
SCORE_STEPS, STEPS = 100, 100  # from scores, which takes seconds, and from what masks cost the model
PRIOR, LEAST_WORTH = 0.03, 0.01  # of the start in the regression on utility; of a score in mean differences
REGIONS, ENOUGH = 2048, 32768  # in a step, and to learn from


def teach_gate(
    model: MSViT,
    loaders: Loaders,
    rates: Sequence[float],
    by: str,
    seed: int,
    steps: int = STEPS,
    progress: bool = False,
):
    """Teach the model's gate alone, by the name of a teacher.

    Args:
        rates: The share of regions that are to lie within one token, for each size of regions from small to large.
        steps: Batches for the teacher "utility".
    """
    first, pictures = "detail" if by == "utility" else by, list(_enough(model, loaders))
    with torch.random.fork_rng(devices=[]), torch.autocast(model.cut.device.type, enabled=False):
        torch.manual_seed(seed)
        together = torch.cat(pictures)
        for level, gate in enumerate(model.gate.levels):
            z = torch.cat([SCORES[first](images, model, loaders, level) for images in pictures])
            z = (z.mean() - z) / z.std().clamp(min=1e-6)
            _descend(gate, _score_losses(gate, together, z), SCORE_STEPS, False)
        if by == "utility":
            _descend(model.gate, _utility_losses(model, loaders, rates), steps, progress)
    _decide(model, pictures, rates)


def _enough(model: MSViT, loaders: Loaders) -> Iterator[Tensor]:
    """Yield training pictures, until they have regions enough to learn from."""
    seen = 0
    for batch in loaders.first_pictures():
        yield batch.images
        seen += len(batch.images) * math.prod(model.grid(batch.images.shape[-2:]))
        if seen >= ENOUGH:
            break


def _score_losses(gate: nn.Module, pictures: Tensor, z: Tensor) -> Iterator[Tensor]:
    """Yield the loss of a gate against the standardised scores `[n, hw]` of pictures' regions, without an end."""
    device, count = next(gate.parameters()).device, max(REGIONS // z.shape[1], 1)
    while True:
        some = torch.randint(len(pictures), (min(count, len(pictures)),))
        yield F.smooth_l1_loss(gate(pictures[some].to(device)).flatten(1), z[some].to(device))


def _utility_losses(model: MSViT, loaders: Loaders, rates: Sequence[float]) -> Iterator[Tensor]:
    """Yield the loss of the gate against what random masks cost the model, without an end."""
    start, seen = copy.deepcopy(model.gate), torch.zeros(2)
    for images, more, gap in _mask_costs(model, loaders, rates):
        with torch.no_grad():
            before = [gate(images) for gate in start.levels]
        scores = [gate(images) for gate in model.gate.levels]
        guess = _total(more, scores)
        seen = 0.95 * seen + torch.stack([(guess * gap).sum(), guess.square().sum()]).detach().to(seen)
        worth = max((seen[0] / seen[1].clamp(min=1e-12)).item(), LEAST_WORTH)
        apart = sum((g - g0).square().mean() for g, g0 in zip(scores, before, strict=True)) / len(scores)
        yield F.smooth_l1_loss(worth * guess, gap) + PRIOR * apart


@torch.no_grad()
def _mask_costs(
    model: MSViT, loaders: Loaders, rates: Sequence[float]
) -> Iterator[tuple[Tensor, list[Tensor], Tensor]]:
    """Yield pictures, how much less of each region one random mask has within a token, and what that one costs less.

    Both are differences between two masks; costs are in units of the mean difference so far.
    """
    device, size = model.cut.device, 0.0
    static = [Static("random", rate).train() for rate in asked_rates(rates)]
    for epoch in itertools.count():
        set_epoch(loaders.train, epoch)
        for batch in loaders.train:
            images = batch.images.to(device)
            grids = model.grids(images.shape[-2:])
            pair = [[rule.score(images, [grid])[0] for rule, grid in zip(static, grids, strict=True)] for _ in range(2)]
            with model.evaluating():
                dense = model.run(images, model.all_fine(images.shape[-2:])).logits
                first, second = (divergence(dense, model.run(images, [m.bool() for m in part]).logits) for part in pair)
            gap = first - second
            size = gap.abs().mean() if not size else 0.95 * size + 0.05 * gap.abs().mean()
            active = [activity_of(undivided(part), model.scale)[-2::-1] for part in pair]
            yield images, [b - a for a, b in zip(*active, strict=True)], gap / size.clamp(min=1e-12)


def _total(more: Sequence[Tensor], scores: Sequence[Tensor]) -> Tensor:
    """Return what scores say of pictures in which so much more is divided, `[B]`."""
    return sum((a * g).sum((1, 2)) for a, g in zip(more, scores, strict=True))


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """Return KL(dense || other) of the answers `[B, K]` or, as a mean over the pixels, `[B, K, H, W]`, `[B]`."""
    p, q = dense.float().log_softmax(1), other.float().log_softmax(1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1).reshape(len(p), -1).mean(1)


def _descend(gate: nn.Module, losses: Iterator[Tensor], steps: int, progress: bool):
    rate = RATES[gate.network]
    optimizer = torch.optim.AdamW(gate.parameters(), lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for loss in bar(itertools.islice(losses, steps), "teaching the gate", steps, unit="steps", shown=progress):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()  # or it would be part of the first step of the joint stage


def asked_rates(rates: Sequence[float]) -> list[float]:
    """Return of each size the share of undivided regions among those that are asked, from the shares among all."""
    above = [*rates[1:], 0.0]
    return [min(max((u - v) / max(1 - v, 1e-9), 0.0), 1.0) for u, v in zip(rates, above, strict=True)]


@torch.no_grad()
def _decide(model: MSViT, pictures: list[Tensor], rates: Sequence[float]):
    """Make decisions of the gates' scores g, from the largest regions down, by their last layers."""
    device, grids, whole = model.cut.device, model.grids(pictures[0].shape[-2:]), None
    for gate, grid, rate in zip(*map(reversed, (model.gate.levels, grids, asked_rates(rates))), strict=True):
        scores = torch.cat([gate(images.to(device)) for images in pictures])
        closed = torch.zeros_like(scores) if whole is None else spread(whole, grid)
        g = scores[closed < 0.5] if (closed < 0.5).any() else scores.flatten()
        middle, scale = g.quantile(1 - rate), SLOPE / g.std().clamp(min=1e-6)
        gate.mlp[-1].bias.sub_(middle).mul_(scale)
        gate.mlp[-1].weight.mul_(scale)
        whole = (scores > middle).float().maximum(closed)


def detail(images: Tensor, model: MSViT, loaders: Loaders, level: int = 0) -> Tensor:
    """Return the logarithm of what averaging a region throws away, `[B, hw]`, for a level's regions."""
    scale, (h, w), side = model.scales[level + 1], model.grids(images.shape[-2:])[level], model.coarse_patch * 2**level
    images = images[..., : h * side, : w * side]
    lost = (images - enlarge(shrink(images, scale), scale)).square()
    return (patchify(lost, side).mean(-1) + 1e-4).log()


def entropy(images: Tensor, model: MSViT, loaders: Loaders, level: int = 0) -> Tensor:
    """Return the entropy of a level's regions' grey values less a constant, `[B, hw]`."""
    grids = model.grids(images.shape[-2:])
    rule = Entropy([Entropy().thresholds[0]] * len(grids), mean=loaders.mean, std=loaders.std)
    return -rule.score(images, grids)[level].flatten(1).logit()


SCORES: dict[str, Callable[..., Tensor]] = {"detail": detail, "entropy": entropy}
