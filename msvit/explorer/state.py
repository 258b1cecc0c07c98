"""What the explorer shows of one model on one picture, under a threshold and what a hand has painted.

The gate's decisions are computed once (`look`); a step of the threshold or of the brush only runs the backbone again,
on the tokens that are left (`see`). How it is drawn is told in `panels`.
"""

import math
import sys
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..core import macs as measure
from ..data import IGNORE
from ..evaluation.segmentation import class_table, confusion
from ..models.msvit import Result
from .models import Subject, timed
from .sources import Shot

FREE = -1  # not painted
TOKENIZER, LAST = -1, sys.maxsize  # stages before the first block, and behind all blocks


@dataclass(frozen=True)
class Look:
    """A picture before a model: all that no threshold and no brush changes.

    Attributes:
        pixels: What the model is given, `[1, 3, H, W]`.
        scores: The gate's logits, `[h, w]`; None where a rule stands in its place.
        soft: m in [0, 1], coarse where it is high, `[h, w]`: the gate's probability of coarse, or what the rule says.
        gate_ms: Milliseconds that the gate took.
    """

    subject: Subject
    shot: Shot
    pixels: Tensor
    scores: np.ndarray | None
    soft: np.ndarray
    gate_ms: float

    @property
    def truth(self) -> np.ndarray | None:
        """The true class of each pixel, `[H, W]`, if it is known and among the model's."""
        return self.shot.labels if self.shot.regions == self.subject.classes else None

    def decisions(self, threshold: float) -> np.ndarray:
        """Coarse regions under a threshold, bool `[h, w]`."""
        return self.soft > np.float32(threshold)

    def cut(self, share: float) -> float:
        """The threshold that brings this picture's MACs as near as it can to a share of dense.

        With m sorted there are as many budgets as distinct values, and the more are fine the more MACs.
        """
        levels = np.unique(self.soft)
        cuts = [0.0, *((levels[1:] + levels[:-1]) / 2).tolist(), 1.0]
        low, high = 0, len(cuts) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.share(cuts[middle]) <= share else (low, middle)
        return min(cuts[low], cuts[high], key=lambda cut: abs(self.share(cut) - share))

    def share(self, threshold: float) -> float:
        """MACs under a threshold, gate included, as a share of dense."""
        coarse, model, size = self.decisions(threshold), self.subject.model, self.pixels.shape[-2:]
        if self.subject.closed:
            macs = float(model.macs_of(torch.tensor([int(coarse.sum())]), size))
        else:
            macs = self.macs(self.run(coarse))
        return macs / model.dense_macs(size)

    @torch.inference_mode()
    def run(self, coarse: np.ndarray) -> Result:
        """The model under given decisions."""
        return self.subject.model.run(self.pixels, mask=torch.from_numpy(coarse))

    def macs(self, result: Result) -> float:
        """MACs of a run and of the gate, which had spoken before it."""
        return float(result.macs) + measure.gate_macs(self.subject.model.gate, self.soft.size)


class Part(NamedTuple):
    """What there was after a decision on tokens, see `passage.Stage`.

    Attributes:
        layer: The block, or TOKENIZER.
        where: `[H_f, W_f]`, a number for each fine patch, the same for those that share a token; -1 if it was dropped.
        tokens: Patch tokens that were left.
    """

    layer: int
    where: np.ndarray
    tokens: int

    @property
    def name(self) -> str:
        return "after the tokenizer" if self.layer == TOKENIZER else f"at block {self.layer}"

    @property
    def dropped(self) -> int:
        """Fine patches without a token."""
        return int((self.where < 0).sum())


class Score(NamedTuple):
    """How a segmentation agrees with the truth; None where nothing can be said."""

    accuracy: float | None
    miou: float | None
    iou: dict[str, float]


@dataclass(frozen=True)
class State:
    """What came out under a threshold and a painting.

    Attributes:
        painted: What a hand has said about each region, `[h, w]`: 1 coarse, 0 fine, -1 nothing.
        coarse: The decisions, bool `[h, w]`: the painting where there is one, else m > threshold.
        probabilities: A classifier's, of the classes, `[K]`; None of a segmenter.
        labels: A segmenter's class of each pixel, `[H, W]`; None of a classifier.
        tokens: Active ones that enter the first block, prefix included.
        macs: Of the active tokens, gate included.
        ms: Milliseconds of gate and packed model, measured in this very step.
        parts: What a reducer left, stage by stage, the tokenizer's first.
        layer: The stage to be shown is the one nearest to this block.
    """

    look: Look
    threshold: float
    painted: np.ndarray
    coarse: np.ndarray
    probabilities: np.ndarray | None
    labels: np.ndarray | None
    tokens: int
    macs: float
    ms: float
    parts: tuple[Part, ...]
    layer: int = LAST

    @property
    def part(self) -> Part:
        """The stage to be shown."""
        return min(self.parts, key=lambda part: abs(part.layer - self.layer))

    @cached_property
    def score(self) -> Score | None:
        """Of a segmentation whose truth is known."""
        truth, names = self.look.truth, self.look.subject.classes
        if self.labels is None or truth is None:
            return None
        matrix = confusion(torch.from_numpy(self.labels)[None], torch.from_numpy(truth)[None], len(names))[0]
        known, table = int(matrix.sum()), class_table(matrix, list(names)).dropna(subset="iou")
        miou = float(table["iou"].mean())
        return Score(
            int(matrix.trace()) / known if known else None,
            None if math.isnan(miou) else miou,
            dict(zip(table["class"], table["iou"].tolist(), strict=True)),
        )

    def numbers(self) -> dict:
        """All that the view says in figures, as JSON has it."""
        look, model, size = self.look, self.look.subject.model, self.look.pixels.shape[-2:]
        dense = model.dense_macs(size)
        return {
            "model": look.subject.name,
            "note": look.subject.note,
            "picture": look.shot.name,
            **(self._classes() if self.labels is None else self._pixels()),
            "threshold": self.threshold,
            "tokens": self.tokens,
            "dense_tokens": model.vit.num_prefix_tokens + self.coarse.size * model.scale**2,
            "macs": int(self.macs),
            "dense_macs": dense,
            "macs_share": self.macs / dense,
            "ms": self.ms,
            "dense_ms": look.subject.dense_ms,
            "stages": [
                {"layer": None if p.layer == TOKENIZER else p.layer, "tokens": p.tokens, "dropped": p.dropped}
                for p in self.parts
            ],
            "coarse": self.coarse.astype(int).tolist(),
            "painted": self.painted.tolist(),
            "soft": look.soft.tolist(),
            "scores": None if look.scores is None else look.scores.tolist(),
        }

    def _classes(self) -> dict:
        """The figures of a classifier."""
        best, subject = int(self.probabilities.argmax()), self.look.subject
        return {
            "truth": self.look.shot.truth,
            "prediction": subject.classes[best],
            "probability": float(self.probabilities[best]),
        }

    def _pixels(self) -> dict:
        """The figures of a segmenter."""
        score, names, truth = self.score, self.look.subject.classes, self.look.truth
        shares = [labels if labels is None else shares_of(labels, len(names)) for labels in (truth, self.labels)]
        named = [None if x is None else {names[k]: float(x[k]) for k in np.flatnonzero(x)} for x in shares]
        return {
            "truth": named[0],
            "prediction": named[1],
            "accuracy": score.accuracy if score else None,
            "miou": score.miou if score else None,
            "iou": score.iou if score else None,
        }


def shares_of(labels: np.ndarray, classes: int) -> np.ndarray:
    """The share of the pixels that each class has, `[K]`; ignored pixels count for none."""
    return np.bincount(labels[labels != IGNORE], minlength=classes) / max(labels.size, 1)


@torch.inference_mode()
def look(subject: Subject, shot: Shot) -> Look:
    """Puts a picture before a model: what the gate says of it, once for all that follows."""
    pixels, model = subject.normalise(shot.image), subject.model
    model.run(pixels)  # the first call of a size is slower than all later ones
    gating, ms = timed(lambda: model.decide(pixels))
    scores = None if gating.scores is None else gating.scores[0].numpy()
    return Look(subject, shot, pixels, scores, gating.soft[0].numpy(), ms)


@torch.inference_mode()
def see(look: Look, threshold: float, painted: np.ndarray | None = None, layer: int = LAST) -> State:
    """Runs the backbone on the tokens that the threshold and the painting leave."""
    painted = np.full(look.soft.shape, FREE) if painted is None else painted
    coarse = np.where(painted == FREE, look.decisions(threshold), painted == 1)
    result, ms = timed(lambda: look.run(coarse))
    answer = {"probabilities": None, "labels": None}
    if look.subject.segments:
        answer["labels"] = result.logits[0].argmax(0).numpy()
    else:
        answer["probabilities"] = result.logits[0].float().softmax(0).numpy()
    parts = tuple(
        Part(TOKENIZER if stage.layer is None else stage.layer, stage.where[0].numpy(), int(stage.kept))
        for stage in (result.stages if look.subject.model.reducer is not None else ())
    )
    measured = {"tokens": int(result.tokens), "macs": look.macs(result), "ms": look.gate_ms + ms}
    return State(look, threshold, painted, coarse, parts=parts, layer=layer, **answer, **measured)


def as_the_model_sees(state: State) -> np.ndarray:
    """uint8 `[H, W, 3]`: the picture, each coarse region averaged over blocks of k x k pixels."""
    image, k = np.asarray(state.look.shot.image), state.look.subject.model.scale
    height, width, channels = image.shape
    blocks = image.reshape(height // k, k, width // k, k, channels).mean((1, 3))
    reduced = blocks.round().astype(np.uint8).repeat(k, 0).repeat(k, 1)
    (h, w) = state.coarse.shape
    coarse = state.coarse.repeat(height // h, 0).repeat(width // w, 1)
    return np.where(coarse[..., None], reduced, image)
