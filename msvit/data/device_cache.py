"""Pictures that stay on the accelerator: decoded once, and cropped and flipped there.

An accelerator is through with small pictures long before a processor has decoded them again.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from ..progress import bar
from .images import Pictures
from .seeds import hashed

RATIO = 4 / 3  # a crop's sides are 3 : 4 to 4 : 3


class DeviceCache(Dataset):
    """The items of `Pictures` as whole batches on a device; to the bit, where nothing is augmented.

    With `light`, pictures are kept stretched to `size`, and each time a crop of at least half of the area is taken from
    them, and a flip, by numbers that are seeded by (seed, epoch, i).

    Args:
        pictures: Read at the first use, all of them, by so many worker processes.
        mean, std: What cropped pictures are normalised by.
    """

    def __init__(
        self,
        pictures: Pictures,
        device: torch.device,
        workers: int,
        light: bool,
        size: tuple[int, int],
        mean: Sequence[float],
        std: Sequence[float],
    ):
        self.pictures, self.device, self.workers, self.light = pictures, device, workers, light
        self.mean, self.std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (mean, std))
        self.name, self.unreadable = pictures.name, pictures.unreadable
        self._kept = None
        stretch = T.Compose([T.Resize(list(size), T.InterpolationMode.BICUBIC), T.PILToTensor()])
        pictures.transform = partial(_with_aspect, stretch if light else pictures.transform)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitems__(self, keys: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        if self._kept is None:
            self._kept = self._read()
        images, aspects, targets, indices = self._kept
        epochs, numbers = np.divmod(np.asarray(keys), len(self))
        i = torch.from_numpy(numbers).to(self.device)
        chosen = images[i]
        if self.light:
            uniform = draws(4, self.pictures.seed, 7, epochs, numbers).to(self.device)
            chosen = (crop(chosen.float() / 255, boxes(uniform, aspects[i])) - self.mean) / self.std
        return chosen, targets[i], indices[i]

    def _read(self) -> tuple[Tensor, ...]:
        """Return all pictures with their aspects (width by height), targets and indices, on the device."""
        loader = DataLoader(self.pictures, 256, num_workers=self.workers)
        parts = []
        for (images, aspects), targets, indices in bar(loader, f"reading {self.pictures.label}"):
            parts.append((images, aspects.float(), targets, indices))
        return tuple(torch.cat(part).to(self.device) for part in zip(*parts, strict=True))


def _with_aspect(transform: Callable, image: Image) -> tuple[Tensor, float]:
    """Return what a transform makes of a picture, and its width by its height before."""
    return transform(image), image.width / image.height


def draws(count: int, *words) -> Tensor:
    """Return numbers in [0, 1), `[B, count]`, from integers and arrays `[B]` of them."""
    columns = [hashed(*words, n) >> np.uint64(40) for n in range(count)]
    return torch.from_numpy(np.stack(columns, 1).astype(np.float32) / np.float32(2**24))


class Boxes(NamedTuple):
    """Parts of pictures, each `[B]`: sides and centres as shares of the picture's, and -1 where it is flipped, or 1."""

    width: Tensor
    height: Tensor
    x: Tensor
    y: Tensor
    side: Tensor


def boxes(uniform: Tensor, aspects: Tensor) -> Boxes:
    """Return parts of half of the area to all of it, with sides as 3 : 4 to 4 : 3 where a picture has such a part.

    Args:
        uniform: `[B, 4]`, uniform in [0, 1): area and flip, sides, and where it is.
        aspects: `[B]`, width by height of the pictures.
    """
    flip, area = (uniform[:, 0] * 2).floor(), 0.5 + (uniform[:, 0] * 2 % 1) / 2
    ratio = ((2 * uniform[:, 1] - 1) * math.log(RATIO)).exp()
    ratio = ratio.maximum(area * aspects).minimum(aspects / area)  # so that both sides fit
    width, height = (area * ratio / aspects).sqrt(), (area * aspects / ratio).sqrt()
    x, y = (size / 2 + (1 - size) * at for size, at in ((width, uniform[:, 2]), (height, uniform[:, 3])))
    return Boxes(width, height, x, y, 1 - 2 * flip)


def crop(images: Tensor, at: Boxes) -> Tensor:
    """Cut these parts out of pictures `[B, 3, H, W]` with values in [0, 1], at the full size."""
    none = torch.zeros_like(at.x)
    rows = (at.width * at.side, none, 2 * at.x - 1), (none, at.height, 2 * at.y - 1)
    grid = torch.stack([torch.stack(row, 1) for row in rows], 1)
    grid = F.affine_grid(grid, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, "bicubic", "border", align_corners=False).clamp(0, 1)


def keep(pictures: Dataset, augment: str, device: torch.device, workers: int, **settings) -> Dataset:
    """Return a `DeviceCache` of the pictures, or themselves: of a stream, other augmentation, or without room."""
    if not isinstance(pictures, Pictures) or augment not in ("none", "light"):
        return pictures
    light = augment == "light"
    needed = len(pictures) * 3 * math.prod(settings["size"]) * (1 if light else 4)
    if needed > room(device):
        return pictures
    return DeviceCache(pictures, device, workers, light, **settings)


def room(device: torch.device) -> int:
    """Return how many bytes a split's pictures may take: a quarter of what is free on a CUDA device, elsewhere none."""
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else 0
