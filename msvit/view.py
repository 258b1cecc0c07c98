"""What the explorer shows of one model on one picture, under a threshold and what a hand has painted.

The gate's scores are computed once (`look`); a step of the threshold or of the brush only runs the backbone again, on
the tokens that are left (`see`). How it is drawn is told in `panels`.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .gallery import Shot, Subject, timed

FREE = -1  # not painted


@dataclass(frozen=True)
class Look:
    """A picture before a model: all that no threshold and no brush changes.

    Attributes:
        pixels: What the model is given, `[1, 3, H, W]`.
        scores: The gate's logits, `[h, w]`.
        soft: m = sigmoid(score / temperature), the probability of coarse, `[h, w]`.
        gate_ms: Milliseconds that the gate took.
    """

    subject: Subject
    shot: Shot
    pixels: Tensor
    scores: np.ndarray
    soft: np.ndarray
    gate_ms: float

    def cut(self, share: float) -> float:
        """The threshold that brings this picture's MACs as near as it can to a share of dense.

        With m sorted there are as many budgets as distinct values; the MACs of each follow from the number of regions
        above it alone, so nothing is run.
        """
        levels = np.unique(self.soft)
        cuts = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
        return float(min(cuts, key=lambda cut: abs(self.share(cut) - share)))

    def share(self, threshold: float) -> float:
        """MACs under a threshold, gate included, as a share of dense."""
        coarse, size = int((self.soft > np.float32(threshold)).sum()), self.pixels.shape[-2:]
        return float(self.subject.model.macs_of(torch.tensor([coarse]), size)) / self.subject.model.dense_macs(size)


@dataclass(frozen=True)
class State:
    """What came out under a threshold and a painting.

    Attributes:
        painted: What a hand has said about each region, `[h, w]`: 1 coarse, 0 fine, -1 nothing.
        coarse: The decisions, bool `[h, w]`: the painting where there is one, else m > threshold.
        probabilities: Of the classes, `[K]`.
        tokens: Active ones, prefix included.
        macs: Of the active tokens, gate included.
        ms: Milliseconds of gate and packed backbone, measured in this very step.
    """

    look: Look
    threshold: float
    painted: np.ndarray
    coarse: np.ndarray
    probabilities: np.ndarray
    tokens: int
    macs: float
    ms: float

    def numbers(self) -> dict:
        """All that the view says in figures, as JSON has it."""
        look, model, size = self.look, self.look.subject.model, self.look.pixels.shape[-2:]
        best, dense = int(self.probabilities.argmax()), model.dense_macs(size)
        return {
            "model": look.subject.name,
            "picture": look.shot.name,
            "truth": look.shot.truth,
            "prediction": look.subject.classes[best],
            "probability": float(self.probabilities[best]),
            "threshold": self.threshold,
            "tokens": self.tokens,
            "dense_tokens": model.vit.num_prefix_tokens + self.coarse.size * model.scale**2,
            "macs": int(self.macs),
            "dense_macs": dense,
            "macs_share": self.macs / dense,
            "ms": self.ms,
            "dense_ms": look.subject.dense_ms,
            "coarse": self.coarse.astype(int).tolist(),
            "painted": self.painted.tolist(),
            "scores": look.scores.tolist(),
        }


@torch.inference_mode()
def look(subject: Subject, shot: Shot) -> Look:
    """Puts a picture before a model: the gate's scores, once for all that follows."""
    pixels, gate = subject.normalise(shot.image), subject.model.gate
    subject.model.run(pixels)  # the first call of a size is slower than all later ones
    scores, ms = timed(lambda: gate(pixels))
    soft = torch.sigmoid(scores / gate.temperature)
    return Look(subject, shot, pixels, scores[0].numpy(), soft[0].numpy(), ms)


@torch.inference_mode()
def see(look: Look, threshold: float, painted: np.ndarray | None = None) -> State:
    """Runs the backbone on the tokens that the threshold and the painting leave."""
    painted = np.full(look.soft.shape, FREE) if painted is None else painted
    coarse = np.where(painted == FREE, look.soft > np.float32(threshold), painted == 1)
    model = look.subject.model
    result, ms = timed(lambda: model.run(look.pixels, mask=torch.from_numpy(coarse)))
    probabilities = result.logits[0].float().softmax(0).numpy()
    macs = model.macs_of(torch.tensor([int(coarse.sum())]), look.pixels.shape[-2:])
    return State(look, threshold, painted, coarse, probabilities, int(result.tokens), float(macs), look.gate_ms + ms)


def as_the_model_sees(state: State) -> np.ndarray:
    """uint8 `[H, W, 3]`: the picture, each coarse region averaged over blocks of k x k pixels."""
    image, k = np.asarray(state.look.shot.image), state.look.subject.model.scale
    height, width, channels = image.shape
    blocks = image.reshape(height // k, k, width // k, k, channels).mean((1, 3))
    reduced = blocks.round().astype(np.uint8).repeat(k, 0).repeat(k, 1)
    (h, w) = state.coarse.shape
    coarse = state.coarse.repeat(height // h, 0).repeat(width // w, 1)
    return np.where(coarse[..., None], reduced, image)
