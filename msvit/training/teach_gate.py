"""Teaching a gate alone: what it knows before the joint stage, or all that it knows in front of a frozen backbone.

A gate that starts at random decides at random, and the backbone learns to live with that before the gate has learned
anything. So the gate g is first regressed on what it costs a region to be coarse, c, with its sign turned, and then
made a decision of: g <- 1.5 (g − g_q) / std g, g_q being the quantile at which the share of coarse regions is right.

    detail:   c = log(d + 1e-4), d = mean (x − enlarge(average(x)))², what a coarse token does not see
    entropy:  c = the entropy of the region's grey values
    utility:  what the model itself loses, after a start with detail. With two random masks m, m' of a picture and the
              divergences K from the answer with all regions fine, −Σ (m_i − m'_i) g(x_i) follows K(m) − K(m'); no
              label is needed
"""

import itertools
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..core.candidates import enlarge
from ..core.tokens import patchify, shrink
from ..data.loaders import Loaders, set_epoch
from ..gating.rules import Entropy, Static
from ..models.msvit import MSViT

SLOPE = 1.5
RATE = 3e-3  # the regression's peak learning rate
SCORE_STEPS, STEPS = 300, 100  # from scores, which takes seconds, and from what masks cost the model
REGIONS, ENOUGH = 2048, 32768  # in a step, and to learn from


def teach_gate(
    model: MSViT, loaders: Loaders, rate: float, by: str, seed: int, steps: int = STEPS, progress: bool = False
):
    """Teach the model's gate alone, by the name of a teacher, at a share `rate` of coarse regions.

    Args:
        steps: Batches for the teacher "utility".
    """
    seen = _regions(model, loaders, "detail" if by == "utility" else by)
    regions = torch.cat([pixels for pixels, _ in seen])
    with torch.random.fork_rng(devices=[]), torch.autocast(model.cut.device.type, enabled=False):
        torch.manual_seed(seed)
        z = torch.cat([score for _, score in seen])
        losses = _score_losses(model, regions, (z.mean() - z) / z.std().clamp(min=1e-6))
        _descend(model.gate, losses, SCORE_STEPS, False)
        if by == "utility":
            _descend(model.gate, _utility_losses(model, loaders, rate), steps, progress)
    _decide(model.gate, regions.to(model.cut.device), rate)


def _regions(model: MSViT, loaders: Loaders, by: str) -> list[tuple[Tensor, Tensor]]:
    """Return the pixels `[n, c S S]` of regions of training pictures, and their scores `[n]`."""
    seen = []
    for batch in loaders.first_pictures():
        score = SCORES[by](batch.images, model, loaders).flatten()
        seen.append((patchify(batch.images, model.coarse_patch).flatten(0, 1), score))
        if sum(len(pixels) for pixels, _ in seen) >= ENOUGH:
            break
    return seen


def _score_losses(model: MSViT, regions: Tensor, z: Tensor) -> Iterator[Tensor]:
    """Yield the loss of the gate against the standardised scores of some regions, without an end."""
    device = model.cut.device
    while True:
        some = torch.randint(len(regions), (min(REGIONS, len(regions)),))
        yield F.smooth_l1_loss(model.gate.mlp(regions[some].to(device))[:, 0], z[some].to(device))


def _utility_losses(model: MSViT, loaders: Loaders, rate: float) -> Iterator[Tensor]:
    """Yield the loss of the gate against what random masks cost the model, without an end."""
    device, masks, size = model.cut.device, Static("random", rate).train(), 0.0
    for epoch in itertools.count():
        set_epoch(loaders.train, epoch)
        for batch in loaders.train:
            images = batch.images.to(device)
            m = [masks.score(images, model.grid(images.shape[-2:])).regions for _ in range(2)]
            with torch.no_grad(), model.evaluating():
                dense = model.run(images, torch.zeros_like(m[0]).bool()).logits
                first, second = (divergence(dense, model.run(images, part.bool()).logits) for part in m)
            gap = first - second
            size = gap.abs().mean() if not size else 0.95 * size + 0.05 * gap.abs().mean()
            yield F.smooth_l1_loss(((m[1] - m[0]) * model.gate(images)).sum((1, 2)), gap / size.clamp(min=1e-12))


def divergence(dense: Tensor, other: Tensor) -> Tensor:
    """Return KL(dense || other) of the answers `[B, K]` or, as a mean over the pixels, `[B, K, H, W]`, `[B]`."""
    p, q = dense.float().log_softmax(1), other.float().log_softmax(1)
    return F.kl_div(q, p, reduction="none", log_target=True).sum(1).reshape(len(p), -1).mean(1)


def _descend(gate: nn.Module, losses: Iterator[Tensor], steps: int, progress: bool):
    optimizer = torch.optim.AdamW(gate.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=0.1)
    for loss in tqdm(itertools.islice(losses, steps), "gate", steps, disable=not progress, unit=" steps"):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _decide(gate: nn.Module, regions: Tensor, rate: float):
    """Make a decision of the gate's scores by its last layer: 1.5 (g − g_q) / std g."""
    g, last = gate.mlp(regions)[:, 0], gate.mlp[-1]
    scale = SLOPE / g.std().clamp(min=1e-6)
    last.bias.sub_(g.quantile(1 - rate)).mul_(scale)
    last.weight.mul_(scale)


def detail(images: Tensor, model: MSViT, loaders: Loaders) -> Tensor:
    """Return the logarithm of what averaging a region throws away, `[B, hw]`."""
    lost = (images - enlarge(shrink(images, model.scale), model.scale)).square()
    return (patchify(lost, model.coarse_patch).mean(-1) + 1e-4).log()


def entropy(images: Tensor, model: MSViT, loaders: Loaders) -> Tensor:
    """Return the entropy of the regions' grey values less a constant, `[B, hw]`."""
    rule = Entropy(mean=loaders.mean, std=loaders.std)
    return -rule.score(images, model.grid(images.shape[-2:])).regions.flatten(1).logit()


SCORES: dict[str, Callable[[Tensor, MSViT, Loaders], Tensor]] = {"detail": detail, "entropy": entropy}
