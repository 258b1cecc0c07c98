"""Budgets met afterwards: the threshold that gives a model the MACs that it is allowed."""

import torch
from torch import Tensor, nn

from ..checks import check_images
from ..core import macs as measure
from ..core.tokens import spread
from ..gating.rules import Rule


@torch.no_grad()
def calibrate(model: nn.Module, loader, macs: float) -> float:
    """Sets `model.threshold` so that the mean MACs over a loader come nearest to that share of dense; returns it."""
    if not 0 < macs <= 1.1:
        raise ValueError(f"macs={macs}: a share of the dense model's MACs, such as 0.6")
    if isinstance(model.gate, Rule) and not model.gate.adjustable:
        raise ValueError(f"{model.gate} has no threshold to calibrate; choose its rate, with macs_of for the budget")
    training, before = model.training, model.cut.clone()
    model.eval()
    try:
        pictures = _Pictures(model, loader)
        levels = pictures.soft.unique()
        cuts = torch.cat([levels.new_zeros(1), (levels[1:] + levels[:-1]) / 2, levels.new_ones(1)])
        low, high = 0, len(cuts) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if pictures.share(cuts[middle]) <= macs else (low, middle)
        best = min((low, high), key=lambda i: abs(pictures.share(cuts[i]) - macs))
        share = pictures.share(cuts[best])
        before = cuts[best]
    finally:
        model.cut.copy_(before)
        model.train(training)
    return share


class _Pictures:
    """What a gate says of a loader's pictures, and the share of dense MACs that a threshold would give them."""

    def __init__(self, model: nn.Module, loader):
        self.model, self.size = model, None
        self.images, judged, device = [], [], model.cut.device
        try:
            measure.plan(len(model.vit.blocks), torch.tensor([model.vit.num_prefix_tokens + 1]), model.reducer)
            self.closed = True
        except ValueError:
            self.closed = False
        for batch in loader:
            images = (batch if isinstance(batch, Tensor) else batch[0]).to(device)
            check_images(images, model.vit.patch_embed.proj.in_channels, model.coarse_patch)
            if self.size not in (None, images.shape[-2:]):
                raise ValueError(
                    f"pictures of {tuple(self.size)} and {tuple(images.shape[-2:])} px; calibrate on one size"
                )
            self.size = images.shape[-2:]
            grid = model.grid(self.size)
            if isinstance(model.gate, Rule):
                judged.append(model.gate.judge(images, grid))
            else:
                judged.append((model.decide(images).soft, None))
            self.images += [] if self.closed else [images.cpu()]
        if not judged:
            raise ValueError("the loader is empty; calibrate on some pictures")
        self.regions = torch.cat([regions for regions, _ in judged])
        self.blocks = torch.cat([blocks for _, blocks in judged]) if judged[0][1] is not None else None
        self.soft = torch.cat([x.flatten() for x in (self.regions, self.blocks) if x is not None])
        self.dense = model.dense_macs(self.size)

    def share(self, cut: Tensor) -> float:
        """The mean, in closed form where there is one; otherwise the whole model runs."""
        if not self.closed:
            self.model.cut.copy_(cut)
            macs = [self.model.run(images.to(cut.device)).macs for images in self.images]
            return torch.cat(macs).mean().item() / self.dense
        coarse, n_blocks = self.regions > cut, 0
        if self.blocks is not None:
            blocks = self.blocks > cut
            coarse, n_blocks = coarse | (spread(blocks.float(), coarse.shape[1:]) > 0.5), blocks.sum((1, 2))
        return self.model.macs_of(coarse.sum((1, 2)), self.size, n_blocks).mean().item() / self.dense
