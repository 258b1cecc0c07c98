"""The gate: for each coarse patch, one number that says how happily the picture would do with one token there.

`Decider` is what it shares with the others that learn where to be coarse, see `learned`.
"""

from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ..core.precision import in_full
from ..core.sampling import add_logistic_noise, straight_through
from ..core.tokens import patchify


class Decider(nn.Module):
    """A module that scores the h x w coarse regions of pictures, and learns. ``m = 1`` means coarse:

        training:    m = sigmoid((s + log u - log(1 - u)) / T),   u ~ Uniform(0, 1)     (Gumbel-sigmoid)
        evaluation:  m = sigmoid(s / T)

    Its `forward` gives the scores s `[B, h, w]`, its `bias` is a parameter that moves them all alike, and `settings`
    are what builds it again.

    Args:
        temperature: T.
    """

    bias: nn.Parameter
    settings: dict[str, Any]

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


class Gate(Decider, PyTorchModelHubMixin):
    """A small MLP g from the pixels of one coarse patch to one logit (Havtorn et al. 2023).

    It sees one region at a time and nothing but pixels, so a trained gate can be put in front of any backbone with
    the same coarse patch size.

    Args:
        patch: Side of a coarse patch in pixels.
        channels: Channels of the pictures.
        width: Width of the hidden layers.
        temperature: T. A lower one makes harder samples; it does not move the decision at m = 0.5. The prior of GBaS
            has a temperature of its own, and fits best with the same.
    """

    def __init__(self, patch: int = 32, channels: int = 3, width: int = 64, temperature: float = 0.3):
        super().__init__(temperature)
        self.patch, self.channels = patch, channels
        sizes = [channels * patch * patch, width, width, width]
        hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.LayerNorm(o), nn.GELU())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(width, 1))

    @property
    def bias(self) -> nn.Parameter:
        return self.mlp[-1].bias

    @property
    def settings(self) -> dict[str, Any]:
        return {"patch": self.patch, "channels": self.channels, "width": self.mlp[0].out_features}

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[B, h, w]` of pictures `[B, channels, h patch, w patch]`.

        In the precision of the weights, under autocast too: many gates lie near the threshold, where rounding to
        bfloat16 would decide, and would decide otherwise than the float32 that a threshold is calibrated in.
        """
        h, w = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        device = images.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            return self.mlp(patchify(images, self.patch).to(self.mlp[1].weight.dtype)).view(-1, h, w)

    def extra_repr(self) -> str:
        return f"patch={self.patch}, temperature={self.temperature:.3g}"
