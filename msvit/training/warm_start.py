"""The warm start of a gate: before the joint stage it learns which regions have detail, from pictures alone.

A gate that starts at random decides at random, and the backbone learns to live with that before the gate has learned
anything. So the gate is first regressed on a score of each region, z, standardised over the pictures:

    g(x) ≈ −1.5 (z − z_q),    z_q the quantile at which the share of coarse regions is the target

    detail:   z of log(d + 1e-4), d = mean (x − enlarge(average(x)))², what a coarse token does not see
    entropy:  z of the entropy of the region's grey values
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.candidates import enlarge
from ..core.tokens import patchify, shrink
from ..data.loaders import Loaders
from ..gating.rules import Entropy
from ..models.msvit import MSViT

SLOPE = 1.5
STEPS, REGIONS, RATE = 300, 2048, 3e-3  # of the regression: its steps, regions in each, and peak learning rate
ENOUGH = 32768  # regions to learn from


def warm_start(model: MSViT, loaders: Loaders, rate: float, by: str, seed: int):
    """Teach the model's gate a score of the regions, "detail" or "entropy", at a share `rate` of coarse ones."""
    gate, device = model.gate, model.cut.device
    regions, z = [], []
    for batch in loaders.first_pictures():
        regions.append(patchify(batch.images, gate.patch).flatten(0, 1))
        z.append(SCORES[by](batch.images, model, loaders).flatten())
        if sum(map(len, z)) >= ENOUGH:
            break
    regions, z = torch.cat(regions), torch.cat(z)
    z = (z - z.mean()) / z.std().clamp(min=1e-6)
    goal = -SLOPE * (z - z.quantile(rate))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, STEPS, pct_start=0.1)
    training = gate.training
    gate.train()
    for _ in range(STEPS):
        some = torch.randint(len(regions), (REGIONS,), generator=generator)
        with torch.autocast(device.type, enabled=False):
            loss = F.smooth_l1_loss(gate.mlp(regions[some].to(device))[:, 0], goal[some].to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    gate.train(training)


def detail(images: Tensor, model: MSViT, loaders: Loaders) -> Tensor:
    """Return the logarithm of what averaging a region throws away, `[B, hw]`."""
    lost = (images - enlarge(shrink(images, model.scale), model.scale)).square()
    return (patchify(lost, model.coarse_patch).mean(-1) + 1e-4).log()


def entropy(images: Tensor, model: MSViT, loaders: Loaders) -> Tensor:
    """Return the logit of the entropy rule's score with its sign turned, `[B, hw]`."""
    rule = Entropy(mean=loaders.mean, std=loaders.std)
    return -rule.score(images, model.grid(images.shape[-2:])).regions.flatten(1).logit()


SCORES: dict[str, Callable[[Tensor, MSViT, Loaders], Tensor]] = {"detail": detail, "entropy": entropy}
