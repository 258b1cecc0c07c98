"""The evaluation that a model's head asks for."""

from collections.abc import Iterable

from ..models.msvit import MSViT
from . import classification, segmentation
from .predictions import Predict


def evaluate(model: MSViT, loader: Iterable, predict: Predict | None = None, accelerator=None) -> dict[str, float]:
    """Return what `evaluation.classification` or, for a dense head, `evaluation.segmentation` finds on a loader.

    Each picture is counted once by however many processes. The model is in the same mode afterwards.

    Args:
        loader: Yields `msvit.data.loaders.Batch`; prepared by `accelerator` if there is one.
        predict: What to ask instead of `model.run`.
        accelerator: With several processes or autocast.
    """
    if model.head.dense:
        return segmentation.evaluate(model, loader, predict, accelerator).numbers
    return classification.evaluate(model, loader, predict, accelerator)
