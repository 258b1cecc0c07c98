"""What a model says of the batches of a loader."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from ..data.loaders import Batch
from ..models.msvit import MSViT, Result

Predict = Callable[[Tensor, Tensor], Result]  # of pictures and their indices
Objects = Callable[[Tensor, int], Tensor]  # of indices and the side of a patch: bool [B, h, w], where the object is


def predictions(
    model: MSViT, loader: Iterable, predict: Predict | None = None, accelerator=None
) -> Iterator[tuple[Batch, Result]]:
    """Yield each batch of a loader and what a model makes of it; the model's mode is the caller's to set.

    Args:
        predict: Asked with pictures and their indices instead of `model.run`.
        accelerator: Has prepared the loader; with several processes or autocast.
    """
    device = next(model.parameters()).device
    predict = predict or (lambda images, indices: model.run(images))
    for images, targets, indices in loader:
        images, targets = images.to(device), targets.to(device)
        with accelerator.autocast() if accelerator else contextlib.nullcontext():
            result = predict(images, indices)
        yield Batch(images, targets, indices), result


def gathered(parts: list[Tensor]) -> Tensor:
    """Return the rows of all batches as one table, or raise a ValueError if there were none."""
    if not parts:
        raise ValueError("the loader has no pictures to evaluate on")
    return torch.cat(parts)


def object_finder(loader: Iterable) -> Objects | None:
    """Return what tells where the objects are, if the pictures are built-in ones."""
    scenes = getattr(getattr(loader, "dataset", None), "scenes", None)
    if scenes is None:
        return None
    return lambda indices, patch: torch.from_numpy(scenes.object_regions(indices.cpu().numpy(), patch))
