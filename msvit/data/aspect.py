"""Pictures at their own aspect ratio, in batches as lists: for models that take pictures of any size."""

import copy
import math
from collections.abc import Sequence

from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms as T

from .holdout import Subset
from .images import Pictures
from .loaders import Batch, Loaders
from .segmentation import Labelled


class KeepAspect:
    """Resize a picture to about the area of `size`, without a crop, and normalise it.

    It is the way of NaFlex (Tschannen et al. 2025, "SigLIP 2"; NaViT's before it): each picture has about as many
    pixels as a square one would, so that it costs about as much, and sides in its own ratio.
    """

    def __init__(self, size: tuple[int, int], mean: Sequence[float], std: Sequence[float]):
        self.area, self.mean, self.std = size[0] * size[1], mean, std

    def __call__(self, image: Image) -> Tensor:
        resized = T.functional.resize(image, self.sides(image.height, image.width), T.InterpolationMode.BICUBIC)
        return T.functional.normalize(T.functional.to_tensor(resized), self.mean, self.std)

    def sides(self, height: int, width: int) -> list[int]:
        """Return height and width after resizing."""
        factor = math.sqrt(self.area / (height * width))
        return [max(1, round(side * factor)) for side in (height, width)]


def whole_pictures(loaders: Loaders) -> DataLoader:
    """Return a loader of the validation pictures in lists, each at its own aspect ratio and with all that is in it.

    Pictures with label maps stay as they are read; they are only not padded to the largest of a batch.
    """
    transform = KeepAspect(loaders.size, loaders.mean, loaders.std)
    names = ("batch_size", "sampler", "num_workers", "generator")
    settings = {name: getattr(loaders.val, name) for name in names}
    data = _untouched(loaders.val.dataset, transform)
    return DataLoader(data, collate_fn=collate_list, **settings)


def _untouched(data: Dataset, transform: KeepAspect) -> Dataset:
    """Return a data set of the same pictures with another transform; label maps keep theirs, which cuts nothing off."""
    again = copy.copy(data)
    if isinstance(data, Subset):
        again.data = _untouched(data.data, transform)
    elif not isinstance(data, Pictures):
        raise ValueError("aspect='keep' is for pictures in files, which differ in their sides; leave it at 'crop' here")
    elif not isinstance(data, Labelled):
        again.transform = transform
    elif data.crop:
        raise ValueError("aspect='keep' evaluates whole pictures, and held out ones are crops; leave it at 'crop'")
    return again


def collate_list(samples: list[tuple]) -> Batch:
    """Join (image, target, index): images and label maps in lists."""
    images, targets, indices = zip(*samples, strict=True)
    maps = isinstance(targets[0], Tensor)
    return Batch(list(images), list(targets) if maps else default_collate(targets), default_collate(indices))
