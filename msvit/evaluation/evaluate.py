"""The evaluation that a model's head asks for."""

from collections.abc import Iterable

from ..models.msvit import MSViT
from .classification import evaluate_classes
from .predictions import Predict
from .segmentation import evaluate_pixels


def evaluate(model: MSViT, loader: Iterable, predict: Predict | None = None, accelerator=None) -> dict[str, float]:
    """Return what `evaluate_classes` or, for a dense head, `evaluate_pixels` finds on a loader.

    Each picture is counted once by however many processes. The model is in the same mode afterwards.

    Args:
        loader: Yields `msvit.data.loaders.Batch`; prepared by `accelerator` if there is one.
        predict: What to ask instead of `model.run`.
        accelerator: With several processes or autocast.
    """
    if model.head.dense:
        return evaluate_pixels(model, loader, predict, accelerator).numbers
    return evaluate_classes(model, loader, predict, accelerator)
