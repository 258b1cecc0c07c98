"""The gate: for each coarse patch, one number that says how happily the picture would do with one token there."""

from itertools import pairwise

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from ..core.sampling import add_logistic_noise
from ..core.tokens import patchify


class Gate(nn.Module, PyTorchModelHubMixin):
    """A small MLP g from the pixels of one coarse patch to one logit (Havtorn et al. 2023).

    It sees one region at a time and nothing but pixels, so a trained gate can be put in front of any backbone with
    the same coarse patch size. ``m = 1`` means coarse:

        training:    m = sigmoid((g(x) + log u - log(1 - u)) / T),   u ~ Uniform(0, 1)     (Gumbel-sigmoid)
        evaluation:  m = sigmoid(g(x) / T)

    Args:
        patch: Side of a coarse patch in pixels.
        channels: Channels of the pictures.
        width: Width of the hidden layers.
        temperature: T. A lower one makes harder samples; it does not move the decision at m = 0.5. The prior of GBaS
            has a temperature of its own, and fits best with the same.
    """

    def __init__(self, patch: int = 32, channels: int = 3, width: int = 64, temperature: float = 0.3):
        super().__init__()
        self.patch, self.channels = patch, channels
        self.register_buffer("tau", torch.tensor(float(temperature)))
        sizes = [channels * patch * patch, width, width, width]
        hidden = [layer for i, o in pairwise(sizes) for layer in (nn.Linear(i, o), nn.LayerNorm(o), nn.GELU())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(width, 1))

    @property
    def temperature(self) -> float:
        """T; it is saved with the weights, since a schedule moves it while training."""
        return self.tau.item()

    @temperature.setter
    def temperature(self, value: float):
        self.tau.fill_(value)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[B, h, w]` of pictures `[B, channels, h patch, w patch]`.

        In the precision of the weights, under autocast too: many gates lie near the threshold, where rounding to
        bfloat16 would decide, and would decide otherwise than the float32 that a threshold is calibrated in.
        """
        h, w = images.shape[-2] // self.patch, images.shape[-1] // self.patch
        with torch.autocast(images.device.type, enabled=False):
            return self.mlp(patchify(images, self.patch).to(self.mlp[0].weight.dtype)).view(len(images), h, w)

    def soften(self, logits: Tensor) -> Tensor:
        """Return m in [0, 1] from logits: a Gumbel-sigmoid sample while training, its mode in evaluation."""
        logits = logits.float()
        if self.training:
            logits = add_logistic_noise(logits)
        return torch.sigmoid(logits / self.tau)

    def extra_repr(self) -> str:
        return f"patch={self.patch}, temperature={self.temperature:.3g}"
