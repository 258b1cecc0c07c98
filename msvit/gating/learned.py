"""Rivals of the gate that learn too: the same number of coarse regions in every picture, or the same ones.

`GATES` has all that learns where to be coarse, by the names of the recipe's `gating`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import in_interval
from ..core.precision import in_full
from ..core.sampling import add_logistic_noise, with_gradient_of
from ..core.tokens import patchify
from .gate import Decider, Gate, Quadtree


class Quota(Gate):
    """A gate with a fixed quota: of each picture's n regions the K = round(rate n) with the highest scores are coarse.

    Every picture has the same number of tokens. Of equal scores the first regions are coarse. Where there are label
    maps, it is the policy of Content-aware Token Sharing (CTS, Lu et al. 2023): `supervised`, it learns from
    `sharing_loss` alone, and its decisions have neither noise nor gradient. (CTS trains an EfficientNet-Lite0 before
    the segmenter; this is the gate's MLP, beside it.)

    Without label maps only the quota is CTS's. The decisions of noisy scores z = s + logistic noise have the gradient
    of m, which is soft but keeps to the quota, so that a pull on all regions alike moves nothing:

        training:    m = sigmoid((z - t) / T),   t such that the picture's m add up to K
        evaluation:  m = sigmoid((s - t) / T),   t midway between the scores number K and K + 1

    The model's threshold means nothing here; what `calibrate` sets is the rate.

    Args:
        patch: As in `Gate`, like channels and the other settings.
        rate: Share of coarse regions.
        supervised: Learn from label maps.
    """

    PARTS = 1_000_000  # of one, in which the rate is kept: an integer outlives a cast to half precision

    def __init__(
        self, patch: int = 32, channels: int = 3, rate: float = 0.5, supervised: bool = False, **settings: Any
    ):
        super().__init__(patch, channels, **settings)
        self.supervised = supervised
        self.register_buffer("parts", torch.tensor(0))
        self.rate = rate

    @property
    def rate(self) -> float:
        """Share of coarse regions; it is saved with the weights."""
        return self.parts.item() / self.PARTS

    @rate.setter
    def rate(self, value: float):
        self.parts.fill_(round(in_interval("rate", value, "[0, 1]") * self.PARTS))

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": "quota", **super().settings, "supervised": self.supervised}

    def count(self, regions: int) -> Tensor:
        """Return K of so many regions, int64 without a dimension."""
        return (self.parts * regions + self.PARTS // 2) // self.PARTS

    def parts_of(self, regions: int) -> Tensor:
        """Return what `parts` is for each K of so many regions, from all coarse to none."""
        counts = torch.arange(regions, -1, -1, device=self.parts.device)
        return (counts * self.PARTS + regions // 2) // regions

    def decide(self, scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Return m, and the K highest with its gradient; the threshold is not used."""
        flat = in_full(scores.detach() if self.supervised else scores).flatten(1)
        count = self.count(flat.shape[1])
        if self.training and not self.supervised:
            flat = add_logistic_noise(flat)
            soft = relaxed_quota(flat, count, self.tau)
        else:
            soft = torch.sigmoid((flat - between(flat.detach(), count)) / self.tau)
        hard = with_gradient_of(soft, highest(flat.detach(), count).to(soft.dtype))
        return soft.view_as(scores), hard.view_as(scores)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rate={self.rate:g}" + (", supervised" if self.supervised else "")


def highest(scores: Tensor, count: Tensor) -> Tensor:
    """Return True for the `count` highest scores of each row `[B, n]`, of equals for the first."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    chosen = (torch.arange(scores.shape[1], device=scores.device) < count).expand_as(order)
    return torch.zeros_like(chosen).scatter(1, order, chosen)


def between(scores: Tensor, count: Tensor) -> Tensor:
    """Return what lies midway between the scores number `count` and `count` + 1 of each row `[B, n]`, `[B, 1]`."""
    ends = scores.new_full((len(scores), 1), torch.inf)
    ordered = torch.cat([ends, scores.sort(dim=1, descending=True).values, -ends], 1)
    return ordered.index_select(1, count + torch.arange(2, device=scores.device)).mean(1, keepdim=True)


def relaxed_quota(scores: Tensor, count: Tensor, temperature: Tensor | float) -> Tensor:
    """Return m = σ((s − t) / T) of scores `[B, n]`, with t such that each row of m adds up to `count`.

    By the implicit function theorem dt = Σ d ds / Σ d with the slopes d = m (1 − m). So a gradient g by m is one of
    d (g − ḡ) / T by s, where ḡ is the mean of g weighted with d: what pulls at all regions alike is taken out of it.
    """
    scores = scores / temperature
    fixed = scores.detach()
    low, high = fixed.amin(1, keepdim=True) - 40, fixed.amax(1, keepdim=True) + 40  # σ(40) is 1 in any precision
    for _ in range(64):
        t = (low + high) / 2
        more = torch.sigmoid(fixed - t).sum(1, keepdim=True) > count
        low, high = t.where(more, low), high.where(more, t)
    m = torch.sigmoid(fixed - t)
    slopes = m * (1 - m)
    pull = (slopes * scores).sum(1, keepdim=True) / slopes.sum(1, keepdim=True).clamp(min=1e-30)
    return torch.sigmoid(scores - (t + (pull - pull.detach())))


def one_class(labels: Tensor, patch: int) -> Tensor:
    """Return which regions of label maps `[B, h patch, w patch]` have pixels of one class alone, bool `[B, h, w]`.

    As in the authors' own code, ignored pixels are of one more class.
    """
    cells = patchify(labels[:, None].long(), patch)
    return (cells.amin(2) == cells.amax(2)).view(len(labels), labels.shape[1] // patch, labels.shape[2] // patch)


def sharing_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of scores `[B, h, w]` with whether their regions of the labels are of one class.

    A region whose pixels all have one class may share a token (CTS, Lu et al. 2023).
    """
    shared = one_class(labels, labels.shape[-1] // scores.shape[-1])
    return F.binary_cross_entropy_with_logits(in_full(scores), shared.to(in_full(scores).dtype))


class Pattern(Decider):
    """A static pattern that is learned: one score per position, for all pictures the same.

        s_l = GAIN w_l + b

    While training, each picture has its own Gumbel noise, and the gate loss sees the m of all positions, as with a
    gate. It costs no MACs. On pictures of another size the scores are those of the grid it was trained on, bilinearly
    resized.

    Args:
        grid: (h, w), coarse regions of a picture.
        patch: Side of a coarse patch in pixels.
        temperature: T.
    """

    GAIN = 10.0  # a step of Adam moves a score by this many learning rates; many weights of a gate's MLP move its score

    def __init__(self, grid: tuple[int, int], patch: int = 32, temperature: float = 0.3):
        super().__init__(temperature)
        self.grid, self.patch = tuple(grid), patch
        self.weight, self.bias = nn.Parameter(torch.zeros(self.grid)), nn.Parameter(torch.zeros(1))
        self._initial = self.weight.detach().clone()

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": "pattern", "grid": list(self.grid), "patch": self.patch}

    def no_weight_decay(self) -> set[str]:
        """Return names of parameters without decay: a score of 0 is no better than another."""
        return {"weight"}

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores `[B, h, w]` for pictures `[B, c, h patch, w patch]`."""
        grid, scores = tuple(side // self.patch for side in images.shape[-2:]), self.GAIN * self.weight + self.bias
        if grid != self.grid:
            scores = F.interpolate(scores[None, None], grid, mode="bilinear", align_corners=False)[0, 0]
        return scores.expand(len(images), -1, -1)

    def extra_repr(self) -> str:
        return f"grid={self.grid}, patch={self.patch}, temperature={self.temperature:.3g}"


GATES: dict[str, type[Decider]] = {"learned": Gate, "quota": Quota, "pattern": Pattern}


def kind_of(by: str, sizes: int) -> type[Decider] | None:
    """Return what learns by a name of `gating`, for so many sizes of regions; None for a rule, which does not learn."""
    return Quadtree if by == "learned" and sizes > 1 else GATES.get(by)
