"""A whole source of pictures as a model sees and names them, beside its dense backbone: what the gallery shows."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image

from ..core.fast_linear import fast_linear
from ..data.images import UNREADABLE
from ..plots.style import as_the_model_sees
from .models import LoadedModel, run_dense
from .sources import MOST_PICTURES, Picture, PictureSource
from .uploads import PictureError

THUMB = 64  # side of a thumbnail in pixels
SHEET = 16  # thumbnails along the side of a sheet
BATCH = 32


@dataclass(frozen=True)
class Survey:
    """What a classifier makes of N pictures.

    Attributes:
        names: As the source has them; pictures that could not be read are left out.
        truth: Number of the true class, -1 where it is unknown, `[N]`.
        predicted, dense: Numbers of the classes that the model and its dense backbone predict, `[N]`.
        loss: The cross entropy of the true class, NaN where it is unknown, `[N]`.
        tokens: That enter the first block, `[N]`.
        thumbs: Thumbnails of the pixels in the tokens, uint8 `[N, THUMB, THUMB, 3]`.
    """

    names: list[str]
    truth: np.ndarray
    predicted: np.ndarray
    dense: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray
    thumbs: np.ndarray

    def sheet(self, number: int) -> bytes:
        """Return a JPEG of SHEET x SHEET thumbnails, row by row."""
        part = self.thumbs[number * SHEET**2 : (number + 1) * SHEET**2]
        whole = np.zeros((SHEET**2, THUMB, THUMB, 3), np.uint8)
        whole[: len(part)] = part
        pixels = whole.reshape(SHEET, SHEET, THUMB, THUMB, 3).swapaxes(1, 2).reshape(SHEET * THUMB, -1, 3)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=88)
        return buffer.getvalue()


def survey(
    loaded: LoadedModel, source: PictureSource, tell: Callable[[int, int], None] = lambda done, of: None
) -> Survey:
    """Run a classifier and its dense backbone on the first MOST_PICTURES pictures of a source.

    Args:
        tell: Called with how many pictures are done, and of how many.
    """
    if loaded.segments:
        raise ValueError(f"{loaded.name} labels pixels; the gallery is of pictures with one class each")
    names, found, good = source.names()[:MOST_PICTURES], [], []
    for batch in _batches(loaded, source, names):
        found.append(_run(loaded, [picture for _, picture in batch]))
        good += [name for name, _ in batch]
        tell(len(good), len(names))
    if not found:
        raise PictureError("none of these pictures can be read")
    return Survey(good, *(np.concatenate(part) for part in zip(*found, strict=True)))


def _batches(loaded: LoadedModel, source: PictureSource, names: list[str]) -> Iterator[list[tuple[str, Picture]]]:
    """Yield pictures with their names, without those that cannot be read."""
    batch = []
    for name in names:
        try:
            batch.append((name, source.picture(name, loaded.size)))
        except (PictureError, *UNREADABLE):
            continue
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


@torch.inference_mode()
def _run(loaded: LoadedModel, pictures: list[Picture]) -> tuple[np.ndarray, ...]:
    """Return all but the names of a batch's survey."""
    model = loaded.model
    pixels = [TF.to_tensor(picture.image) for picture in pictures]
    images = torch.stack([TF.normalize(image, loaded.mean, loaded.std) for image in pixels])
    result = model.run(images)
    side = model.vit.patch_embed.img_size
    with fast_linear(model.fast_cpu):
        dense = run_dense(model, F.interpolate(images, side) if images.shape[-2:] != tuple(side) else images).argmax(1)
    truth = torch.tensor([class_of(picture, loaded.classes) for picture in pictures])
    loss = F.cross_entropy(result.logits.float(), truth.clamp(min=0), reduction="none")
    seen = [as_the_model_sees(image, coarse, model.scale) for image, coarse in zip(pixels, result.coarse, strict=True)]
    thumbs = [TF.to_pil_image(image.clamp(0, 1)).resize((THUMB, THUMB), Image.Resampling.BOX) for image in seen]
    return (
        truth.numpy(),
        result.logits.argmax(1).numpy(),
        dense.numpy(),
        np.where(truth.numpy() < 0, np.nan, loss.numpy()),
        result.tokens.numpy(),
        np.stack([np.asarray(thumb) for thumb in thumbs]),
    )


def class_of(picture: Picture, classes: tuple[str, ...]) -> int:
    """Return the number of a picture's true class: the known one, or the folder's that it lies in; -1 if none is."""
    names = [picture.truth, *reversed(PurePosixPath(picture.name).parts[:-1])]
    return next((classes.index(name) for name in names if name and name in classes), -1)
