"""The gate: for each coarse patch, one number that says how happily the picture would do with one token there.

`Decider` is what it shares with the others that learn where to be coarse, see `learned`.
"""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import pairwise
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ..checks import in_interval, one_of
from ..core.precision import in_full
from ..core.sampling import add_logistic_noise, straight_through
from ..core.tokens import patchify
from .filters import FilterBank

UNTRAINED = (
    "the gate of this model has learned nothing, so where its tokens are fine is left to chance: train it (msvit "
    "train), teach it (msvit fit-gate), load a trained one, or give a mask or a rule"
)


class Decider(nn.Module):
    """A module that scores the h x w coarse regions of pictures, and learns. ``m = 1`` means coarse:

        training:    m = sigmoid((s + log u - log(1 - u)) / T),   u ~ Uniform(0, 1)     (Gumbel-sigmoid)
        evaluation:  m = sigmoid(s / T)

    Its `forward` gives the scores s `[B, h, w]`, `weight` and `bias` are the parameters of its last layer, of which the
    latter moves all scores alike, and `settings` are what builds it again.

    Args:
        temperature: T.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    settings: dict[str, Any]
    alone = True  # a region is judged by its own pixels alone
    _initial: Tensor | None = None  # `weight` as it was made, until somebody has asked

    @property
    def levels(self) -> tuple["Decider"]:
        """The deciders for each size of regions, from small to large: here one."""
        return (self,)

    def __init__(self, temperature: float = 0.3):
        super().__init__()
        self.register_buffer("tau", torch.tensor(float(temperature)))

    @property
    def temperature(self) -> float:
        """T; it is saved with the weights, since a schedule moves it while training."""
        return self.tau.item()

    @temperature.setter
    def temperature(self, value: float):
        self.tau.fill_(value)

    def soften(self, scores: Tensor) -> Tensor:
        """Return m in [0, 1] from scores: a Gumbel-sigmoid sample while training, its mode in evaluation."""
        scores = in_full(scores)
        if self.training:
            scores = add_logistic_noise(scores)
        return torch.sigmoid(scores / self.tau)

    def decide(self, scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        """Return m, and the decisions with its gradient: m above the threshold, which is 1/2 while training."""
        soft = self.soften(scores)
        return soft, straight_through(soft, 0.5 if self.training else threshold)

    def count_as_trained(self):
        """Let it decide as it is without a warning, where only the number of tokens matters."""
        self._initial = None

    def is_new(self) -> bool:
        """Return, the first time, whether it is as it was made: not trained, taught or loaded since.

        What is quantized, sharded or without data is taken for trained.
        """
        initial, self._initial = self._initial, None
        plain = type(self.weight) in (Tensor, nn.Parameter) and not self.weight.is_meta
        return plain and initial is not None and torch.equal(self.weight, initial.to(self.weight))


NETWORKS = {"pixels": 64, "filters": 8}  # what a gate sees a region with, and its width


class Gate(Decider, PyTorchModelHubMixin):
    """A small network g from pixels to one logit for each coarse patch.

        pixels:   an MLP of three hidden layers on all pixels of the region alone (Havtorn et al. 2023)
        filters:  a hidden layer on how much each of a few small filters finds in the region and in the eight around
                  it, see `FilterBank`; beyond the border of the picture nothing is found

    It sees nothing but pixels, so a trained gate can be put in front of any backbone with the same coarse patch size.

    Args:
        patch: Side of a coarse patch in pixels.
        channels: Channels of the pictures.
        width: Width of the hidden layers (64), or number of filters (8), with a hidden layer of twice as many.
        temperature: T. A lower one makes harder samples; it does not move the decision at m = 0.5. The prior of GBaS
            has a temperature of its own, and fits best with the same.
        network: "pixels" or "filters".
    """

    def __init__(
        self,
        patch: int = 32,
        channels: int = 3,
        width: int | None = None,
        temperature: float = 0.3,
        network: str = "pixels",
    ):
        super().__init__(temperature)
        one_of("network", network, NETWORKS)
        self.patch, self.channels, self.network, self.width = patch, channels, network, width or NETWORKS[network]
        for name in ("patch", "channels", "width"):
            in_interval(name, index(getattr(self, name)), "[1, inf)")
        if network == "filters":
            self.see = nn.Sequential(FilterBank(patch, channels, self.width), nn.LayerNorm(self.width))
        self.mlp = (_on_pixels if network == "pixels" else _on_filters)(patch, channels, self.width)
        self.alone = network == "pixels"
        self._initial = self.weight.detach().clone()

    @property
    def weight(self) -> nn.Parameter:
        return self.mlp[-1].weight

    @property
    def bias(self) -> nn.Parameter:
        return self.mlp[-1].bias

    @property
    def settings(self) -> dict[str, Any]:
        named = {} if self.network == "pixels" else {"network": self.network}
        return {"patch": self.patch, "channels": self.channels, "width": self.width} | named

    def forward(self, images: Tensor, where: Tensor | None = None) -> Tensor:
        """Return the logits `[B, h, w]` of pictures `[B, channels, h patch, w patch]`; what is left over is not seen.

        In the precision of the weights, under autocast too: many gates lie near the threshold, where rounding to
        bfloat16 would decide, and would decide otherwise than the float32 that a threshold is calibrated in.

        Args:
            where: Ask these regions alone, bool `[B, h, w]`; the others have -inf.
        """
        h, w = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        device = images.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            norm = self.mlp[1] if self.alone else self.see[1]  # which stays as it is where linear layers are quantised
            cells = patchify(images[..., : h * self.patch, : w * self.patch], self.patch).to(norm.weight.dtype)
            if not self.alone:
                scores = self.mlp(surroundings(self.see(cells).unflatten(1, (h, w))))[..., 0]
                return scores if where is None else scores.masked_fill(~where, -torch.inf)
            if where is None:
                return self.mlp(cells).view(-1, h, w)
            asked = where.flatten(1)
            scores = cells.new_full(asked.shape, -torch.inf)
            return scores.masked_scatter(asked, self.mlp(cells[asked])[:, 0]).view(-1, h, w)

    def extra_repr(self) -> str:
        return f"patch={self.patch}, network={self.network}, temperature={self.temperature:.3g}"


def surroundings(phi: Tensor) -> Tensor:
    """Return of each region what was found in it and the eight around it, `[B, h, w, 9 K]`, from `[B, h, w, K]`."""
    h, w = phi.shape[1:3]
    padded = F.pad(phi, (0, 0, 1, 1, 1, 1))
    return torch.cat([padded[:, i : i + h, j : j + w] for i in range(3) for j in range(3)], -1)


def _on_pixels(patch: int, channels: int, width: int) -> nn.Sequential:
    sizes = [channels * patch * patch, width, width, width]
    hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.LayerNorm(o), nn.GELU())]
    return nn.Sequential(*hidden, nn.Linear(width, 1))


def _on_filters(patch: int, channels: int, filters: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(9 * filters, 2 * filters), nn.GELU(), nn.Linear(2 * filters, 1))


class Quadtree(nn.Module):
    """A gate for each size of regions; a region is asked where all larger ones around it were divided.

    Args:
        patch: Side of the smallest regions in pixels; those of the next gate are twice as wide.
        sizes: How many gates there are.
        channels, width, temperature, network: Of each, see `Gate`.
    """

    def __init__(self, patch: int = 32, sizes: int = 2, **settings: Any):
        super().__init__()
        self.levels = nn.ModuleList(Gate(patch * 2**i, **settings) for i in range(sizes))

    @property
    def patch(self) -> int:
        """Side of the smallest regions in pixels."""
        return self.levels[0].patch

    @property
    def network(self) -> str:
        """What all gates see their regions with."""
        return self.levels[0].network

    @property
    def temperature(self) -> float:
        """T of all gates."""
        return self.levels[0].temperature

    @temperature.setter
    def temperature(self, value: float):
        for gate in self.levels:
            gate.temperature = value

    @property
    def settings(self) -> dict[str, Any]:
        return {"name": "quadtree", **self.levels[0].settings, "sizes": len(self.levels)}


def make_gate(patch: int, scales: Sequence[int], channels: int, network: str = "pixels") -> nn.Module:
    """Return a new gate for tokens that are so many fine patches of `patch` pixels wide: two scales need one alone."""
    if len(scales) == 2:
        return Gate(patch * scales[1], channels, network=network)
    return Quadtree(patch * scales[1], len(scales) - 1, channels=channels, network=network)


def warn_if_new(gates: Sequence[Decider]):
    """Warn, once for a model, if one of its gates is to decide that has learned nothing."""
    if sum(gate.is_new() for gate in gates):  # each is asked, so that no other level asks later
        warnings.warn(UNTRAINED, stacklevel=2)


def sizes_of(gate: nn.Module | None) -> int | None:
    """Return how many sizes of regions a gate or rule decides about; None where it is open."""
    return len(gate.levels) if hasattr(gate, "levels") else getattr(gate, "sizes", None)
