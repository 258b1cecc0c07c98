"""What the explorer shows of one model on one picture, under a threshold and regions painted by hand.

The gate runs once for each picture (`run_gate`); a step of the threshold or of the brush only runs the backbone again,
on the tokens that are left (`run_backbone`). `panels` draws the result.
"""

import math
import sys
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from ..core.scales import token_sizes
from ..data import IGNORE
from ..evaluation.segmentation import class_table, confusion
from ..models.calibrate import nearest_to_budget, thresholds
from ..models.msvit import Result
from ..plots.style import as_the_model_sees
from .models import LoadedModel
from .painting import UNPAINTED
from .sources import Picture
from .times import Times, time_in_turns

AFTER_TOKENIZER, LAST_LAYER = -1, sys.maxsize  # layers of the slider: before the first block, and behind all blocks


@dataclass(frozen=True)
class GatedPicture:
    """A picture for which a model's gate has run: all that no threshold and no brush changes.

    Attributes:
        pixels: The model's input, `[1, 3, H, W]`.
        scores: The gate's logits, `[h, w]`; None where a rule replaces it.
        soft: m in [0, 1], coarse where it is high, `[h, w]`: the gate's probability of coarse, or the rule's value.
        larger: With more than two scales, the same of larger regions, from small to large; m of a region is then the
            largest one of it and of those around it.
    """

    loaded: LoadedModel
    picture: Picture
    pixels: Tensor
    scores: np.ndarray | None
    soft: np.ndarray
    larger: tuple[np.ndarray, ...] = ()

    @property
    def fine_patches(self) -> int:
        """How many fine patches the picture has."""
        return self.soft.size * self.loaded.model.scale**2

    @property
    def truth(self) -> np.ndarray | None:
        """The true class of each pixel, `[H, W]`, if it is known and among the model's."""
        return self.picture.labels if self.picture.regions == self.loaded.classes else None

    def decisions(self, threshold: float) -> np.ndarray:
        """Return the size of token over each region under a threshold, `[h, w]`: 0 fine, 1 coarse, 2 the next …"""
        return token_sizes(
            [torch.from_numpy(soft > np.float32(threshold)) for soft in (self.soft, *self.larger)]
        ).numpy()

    def threshold_for(self, share: float) -> float:
        """Return the threshold that brings this picture's MACs as near as it can to a share of dense."""
        every = torch.cat([torch.from_numpy(soft).flatten() for soft in (self.soft, *self.larger)])
        return nearest_to_budget(thresholds(every).tolist(), self.share, share)

    def share(self, threshold: float) -> float:
        """Return the MACs under a threshold, gate included, as a share of dense."""
        levels, model, size = self.decisions(threshold), self.loaded.model, self.pixels.shape[-2:]
        if model.adaptive:
            return self.macs(self.run(levels)) / model.dense_macs(size)
        counts = [mask.sum()[None] for mask in masks_of(levels, len(self.larger) + 1)]
        return float(model.macs_of(counts, size)) / model.dense_macs(size)

    @torch.inference_mode()
    def run(self, levels: np.ndarray) -> Result:
        """Run the model under given decisions."""
        return self.loaded.model.run(self.pixels, mask=masks_of(levels, len(self.larger) + 1))

    def macs(self, result: Result) -> float:
        """Return the MACs of a run and of the gate, which ran before it."""
        counts = [u.sum((1, 2)) for u in result.gating.undivided]
        return float(result.macs + self.loaded.model.gate_macs(counts, self.pixels.shape[-2:]))


class TokenMap(NamedTuple):
    """Which token each fine patch belongs to after the tokenizer or after a step of the reducer.

    Attributes:
        layer: The block, or AFTER_TOKENIZER.
        where: `[H_f, W_f]`, a number for each fine patch, the same for those that share a token; -1 if it was dropped.
        tokens: Patch tokens that were left.
    """

    layer: int
    where: np.ndarray
    tokens: int

    @property
    def dropped(self) -> int:
        """Fine patches without a token."""
        return int((self.where < 0).sum())


@dataclass(frozen=True)
class State:
    """The model's output under a threshold and a painting.

    Attributes:
        painted: `[h, w]`: 0 painted fine, 1 coarse, 2 the next size …, UNPAINTED elsewhere.
        levels: The size of token over each region, `[h, w]`, 0 fine, 1 coarse …: the painting where there is one, else
            what the threshold says. A token needs all of its regions for itself.
        probabilities: A classifier's, of the classes, `[K]`; None of a segmenter.
        labels: A segmenter's class of each pixel, `[H, W]`; None of a classifier.
        tokens: Active ones that enter the first block, prefix included.
        macs: Of the active tokens, gate included.
        token_maps: With a reducer, the tokens after the tokenizer and after each of its steps.
        layer: The token map to be shown is the one nearest to this block.
        times: Of this model and of the dense one on this picture, once they are measured.
    """

    gated: GatedPicture
    threshold: float
    painted: np.ndarray
    levels: np.ndarray
    probabilities: np.ndarray | None
    labels: np.ndarray | None
    tokens: int
    macs: float
    token_maps: tuple[TokenMap, ...]
    layer: int = LAST_LAYER
    times: Times | None = None

    @property
    def coarse(self) -> np.ndarray:
        """Which regions lie within one token, bool `[h, w]`."""
        return self.levels > 0

    @property
    def token_map(self) -> TokenMap:
        """The token map to be shown."""
        return min(self.token_maps, key=lambda token_map: abs(token_map.layer - self.layer))

    @cached_property
    def score(self) -> dict:
        """Accuracy, mean IoU and IoU by class of a segmenter's labels; None where these are undefined."""
        truth, names = self.gated.truth, self.gated.loaded.classes
        if truth is None:
            return dict.fromkeys(("accuracy", "miou", "iou"))
        matrix = confusion(torch.from_numpy(self.labels)[None], torch.from_numpy(truth)[None], len(names))[0]
        known, table = int(matrix.sum()), class_table(matrix, list(names)).dropna(subset="iou")
        miou = float(table["iou"].mean())
        return {
            "accuracy": int(matrix.trace()) / known if known else None,
            "miou": None if math.isnan(miou) else miou,
            "iou": dict(zip(table["class"], table["iou"].tolist(), strict=True)),
        }

    def numbers(self) -> dict:
        """Return all figures of the view, as JSON has them."""
        gated, model, size = self.gated, self.gated.loaded.model, self.gated.pixels.shape[-2:]
        dense = model.dense_macs(size)
        return {
            "model": gated.loaded.name,
            "note": gated.loaded.note,
            "picture": gated.picture.name,
            **self._prediction_numbers(),
            "threshold": self.threshold,
            "tokens": self.tokens,
            "dense_tokens": model.vit.num_prefix_tokens + self.coarse.size * model.scale**2,
            "macs": int(self.macs),
            "dense_macs": dense,
            "macs_share": self.macs / dense,
            **self._time_numbers(),
            "stages": [
                {"layer": None if m.layer == AFTER_TOKENIZER else m.layer, "tokens": m.tokens, "dropped": m.dropped}
                for m in self.token_maps
            ],
            "coarse": self.levels.tolist(),
            "painted": self.painted.tolist(),
            "soft": gated.soft.tolist(),
            "scores": None if gated.scores is None else gated.scores.tolist(),
        }

    def _time_numbers(self) -> dict:
        """Return medians and quartiles of the times, where they are measured."""
        if self.times is None:
            return {"ms": None, "dense_ms": None}
        pairs = {"": self.times.gated, "dense_": self.times.dense}
        return {
            f"{prefix}ms{end}": value
            for prefix, spread in pairs.items()
            for end, value in zip(("", "_low", "_high"), spread, strict=True)
        }

    def _prediction_numbers(self) -> dict:
        """Return the true and the predicted class; of a segmenter the shares of the pixels, and how well they agree."""
        names, truth = self.gated.loaded.classes, self.gated.truth
        if self.labels is None:
            p, best = self.probabilities, int(self.probabilities.argmax())
            return {"truth": self.gated.picture.truth, "prediction": names[best], "probability": float(p[best])}

        def shares(labels: np.ndarray) -> dict[str, float]:
            return {names[k]: share for k, share in enumerate(shares_of(labels, len(names)).tolist()) if share}

        known = None if truth is None else shares(truth)
        return {"truth": known, "prediction": shares(self.labels), **self.score}


def masks_of(levels: np.ndarray, sizes: int) -> list[Tensor]:
    """Return which regions of each size lie within one token, bool, from the sizes of tokens over the smallest ones."""
    masks = []
    for size in range(1, sizes + 1):
        k = 2 ** (size - 1)
        h, w = (side // k for side in levels.shape)
        whole = (levels[: h * k, : w * k] >= size).reshape(h, k, w, k).all((1, 3))
        masks.append(torch.from_numpy(whole))
    return masks


def layer_name(layer: int) -> str:
    """Return a block, or AFTER_TOKENIZER, in words."""
    return "after the tokenizer" if layer == AFTER_TOKENIZER else f"at block {layer}"


def shares_of(labels: np.ndarray, classes: int) -> np.ndarray:
    """Return the share of the pixels that each class has, `[K]`; ignored pixels count for none."""
    return np.bincount(labels[labels != IGNORE], minlength=classes) / max(labels.size, 1)


@torch.inference_mode()
def run_gate(loaded: LoadedModel, picture: Picture) -> GatedPicture:
    """Run a model's gate on a picture."""
    pixels, model = TF.normalize(TF.to_tensor(picture.image), loaded.mean, loaded.std)[None], loaded.model
    gating = model.decide(pixels, everywhere=True)
    scores = None if gating.scores is None else gating.scores[0].numpy()
    soft, *larger = (level[0].numpy() for level in gating.nested)
    return GatedPicture(loaded, picture, pixels, scores, soft, tuple(larger))


@torch.inference_mode()
def run_backbone(
    gated: GatedPicture, threshold: float, painted: np.ndarray | None = None, layer: int = LAST_LAYER
) -> State:
    """Run the backbone on the tokens that the threshold and the painting leave."""
    painted = np.full(gated.soft.shape, UNPAINTED) if painted is None else painted
    wanted = np.where(painted == UNPAINTED, gated.decisions(threshold), painted)
    levels = token_sizes(masks_of(wanted, len(gated.larger) + 1)).numpy()
    result = gated.run(levels)
    segments = gated.loaded.segments
    return State(
        gated,
        threshold,
        painted,
        levels,
        probabilities=None if segments else result.logits[0].float().softmax(0).numpy(),
        labels=result.logits[0].argmax(0).numpy() if segments else None,
        tokens=int(result.tokens),
        macs=gated.macs(result),
        token_maps=tuple(
            TokenMap(AFTER_TOKENIZER if stage.layer is None else stage.layer, stage.where[0].numpy(), int(stage.kept))
            for stage in (result.stages if gated.loaded.model.reducer is not None else ())
        ),
        layer=layer,
    )


def with_times(state: State) -> State:
    """Return the state with the times of gate and packed model, and of the dense one, on its picture."""
    gated, model = state.gated, state.gated.loaded.model

    @torch.inference_mode()
    def run_gated():
        model.decide(gated.pixels)
        gated.run(state.levels)

    return replace(state, times=time_in_turns(run_gated, gated.loaded.run_dense))


def pixels_of_tokens(state: State) -> np.ndarray:
    """Return the picture, uint8 `[H, W, 3]`, coarse regions averaged over k x k pixels, as the tokenizer does."""
    image = torch.from_numpy(np.array(state.gated.picture.image)).permute(2, 0, 1).float()
    reduced = as_the_model_sees(image, torch.from_numpy(state.levels), state.gated.loaded.model.scale)
    return reduced.round().byte().permute(1, 2, 0).numpy()
