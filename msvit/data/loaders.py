"""Loaders of training and validation pictures, built-in scenes or real ones, behind one function.

Order and augmentation of an epoch are functions of (seed, epoch) alone, whatever the number of workers, of
processes or of epochs that this process has seen: the sampler hands out keys epoch * n + i, and picture i is
augmented with random numbers seeded by (seed, epoch, i). A run resumed at an epoch's boundary sees what an
undisturbed one sees.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from ..checks import one_of
from .device_cache import DeviceCache, keep
from .images import KINDS, Pictures, Stream, Unreadable, open_sources
from .made import Made
from .scenes import DIFFICULTIES, Scenes
from .screens import Screens
from .seeds import permutation

BUILT_IN = (*(f"scenes:{name}" for name in DIFFICULTIES), "screens")
AUGMENT = {  # by name, what goes to timm's create_transform for training pictures
    "none": None,
    "light": {"scale": (0.5, 1.0), "hflip": 0.5, "color_jitter": None},
    # mmax9: at magnitude 10 posterizing leaves 0 bits, which newer versions of Pillow refuse
    "timm": {"auto_augment": "rand-m9-mmax9-mstd0.5-inc1", "re_prob": 0.25, "re_mode": "pixel"},
}


class Batch(NamedTuple):
    """What the loaders yield.

    `indices` tell which pictures these are. Where file i cannot be read, the next readable one stands in, so
    that the batch keeps its shape, and the index is ~i = -1 - i: leave rows with a negative index out of
    every metric.

    Of pictures at their own aspect ratio (`aspect`) images are a list of [3, H, W], and label maps one of [H, W].
    """

    images: torch.Tensor  # float32 [B, 3, H, W], normalised
    targets: torch.Tensor  # int64 [B], or [B, H, W] for segmentation
    indices: torch.Tensor  # int64 [B]


@dataclass(frozen=True)
class Loaders:
    """The loaders of a data set and what belongs to it; `calibration` has the training pictures without augmentation.

    Call `set_epoch(loaders.train, e)` before epoch e, also after `accelerator.prepare`.
    """

    train: DataLoader
    val: DataLoader
    calibration: DataLoader
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: tuple[int, int]

    @property
    def steps(self) -> int:
        """Training batches in an epoch, over all processes together."""
        return len(self.train)

    def first_pictures(self, count: int = 2048) -> Iterator[Batch]:
        """Yield some training pictures without augmentation; unlike a prepared loader's, the same for all processes."""
        set_epoch(self.calibration, 0)
        return itertools.islice(self.calibration, math.ceil(count / self.calibration.batch_size))

    def names(self, split: str, indices) -> list[str]:
        """Return the files of a batch (`batch.indices`), for messages; a stand-in goes by the broken file's name."""
        return [self._data(split).name(i if i >= 0 else ~i) for i in map(int, indices)]

    def unreadable(self, split: str) -> list[Unreadable]:
        """Return the files of a split that could not be read so far, by this process and its workers.

        Built-in pictures are computed, and what timm's readers skip in a stream they only log: of these there are none.
        """
        return getattr(self._data(split), "unreadable", list)()

    def _data(self, split: str) -> Dataset:
        return getattr(self, one_of("split", split, ("train", "val"))).dataset


class EpochSampler(Sampler):
    """Hands out keys epoch * n + i, in an order that depends on (seed, epoch), or from 0 to n - 1."""

    def __init__(self, n: int, seed: int, shuffle: bool):
        self.n, self.seed, self.shuffle, self.epoch = n, seed, shuffle, 0

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        order = permutation(self.n, self.seed, 2, self.epoch) if self.shuffle else np.arange(self.n)
        return iter((order + self.epoch * self.n).tolist())

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def set_epoch(loader: DataLoader, epoch: int) -> None:
    """Make `epoch` the one that the loader yields next, whether accelerate has prepared the loader or not."""
    for owner in (loader, loader.sampler, loader.dataset):
        if hasattr(owner, "set_epoch"):
            owner.set_epoch(epoch)
            return
    raise TypeError(f"{type(loader).__name__} does not come from make_loaders: it has no epochs")


class BuiltIn(Dataset):
    """Built-in pictures behind the sampler's keys; a whole batch is made at once.

    Args:
        masks: Targets are the masks, whose classes are `Made.regions`, instead of the labels.
    """

    def __init__(self, scenes: Made, masks: bool = False):
        self.scenes, self.masks, self.name = scenes, masks, scenes.name
        self.classes = scenes.regions if masks else scenes.classes

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitems__(self, keys: Sequence[int]) -> Batch:
        i = np.asarray(keys) % len(self)
        images, targets = self.scenes.batch(i)
        if self.masks:
            targets = torch.from_numpy(self.scenes.masks(i).astype(np.int64))
        return Batch(images, targets, torch.from_numpy(i))

    def __getitem__(self, key: int) -> tuple[torch.Tensor, ...]:
        return tuple(column[0] for column in self.__getitems__([key]))


def collate(samples: tuple | list[tuple]) -> Batch:
    """Stack (image, target, index), unless the data set did."""
    return Batch(*(samples if isinstance(samples, tuple) else default_collate(samples)))


def make_loaders(
    data: str = "scenes:easy",
    size: int | tuple[int, int] = 64,
    batch: int = 128,
    val_batch: int = 256,
    train_n: int = 8192,
    val_n: int = 2048,
    seed: int = 0,
    workers: int = 0,
    augment: str = "none",
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
    device: torch.device | None = None,
) -> Loaders:
    """Make loaders of `Batch`es for training and validation.

    Training shuffles by (seed, epoch) and drops the last incomplete batch; validation keeps every picture, in
    a fixed mixed order. With several processes let accelerate split each batch (`split_batches=True`):
    together they see what one process would see. Mixup is the caller's; `timm.data.Mixup` draws from numpy's
    global random numbers, so seed those at the start of each epoch.

    Args:
        data: "scenes:easy", "scenes:middle", "scenes:hard", "scenes:scales", "screens"; "folder:ROOT" with
            ROOT/train/CLASS/*.jpg and ROOT/val/CLASS/*.jpg; "tar:ROOT" with ROOT/train.tar and ROOT/val.tar of such
            folders; or a name for timm's `create_dataset` with ":ROOT" where it needs one, such as
            "hfds/uoft-cs/cifar10", "wds/:ROOT" or "torch/cifar10:ROOT".
        size: of the pictures in pixels, or (H, W).
        train_n: number of training pictures in an epoch; 0, or more than there are, for all (built-in ones: 8192).
        val_n: the same for validation (built-in ones: 2048).
        workers: processes that read ahead.
        augment: "none", "light" (a crop of at least half of the area, flip) or "timm" (RandAugment, random
            erasing). Built-in pictures take "none" only: resized, they would show something else.
        mean, std: what real pictures are normalised by; built-in ones have their own.
        device: where real pictures are kept and augmented, if it is a CUDA device with room for them.
    """
    one_of("augment", augment, AUGMENT)
    size = (size, size) if isinstance(size, int) else tuple(size)
    if data in BUILT_IN:
        if augment != "none":
            raise ValueError(
                f"augment={augment!r} is for real pictures; built-in ones take 'none' and a larger train_n"
            )
        train, val = built_in(data, size, train_n, val_n, seed)
        calibration, classes, mean, std = train, train.classes, Made.mean, Made.std
    else:
        if not data.startswith(KINDS):
            one_of("data", data, BUILT_IN + KINDS)
        datasets, classes = _real(data, size, (batch, val_batch), (train_n, val_n), seed, workers, augment, mean, std)
        train, val, calibration = datasets
        if device is not None:
            settings = {"size": size, "mean": mean, "std": std}
            train = keep(train, augment, device, workers, **settings)
            val = keep(val, "none", device, workers, **settings)
    loaders = load_splits(train, val, calibration, batch, val_batch, seed, workers)
    return Loaders(*loaders, classes, tuple(mean), tuple(std), size)


def built_in(data: str, size: tuple[int, int], train_n: int, val_n: int, seed: int, masks=False) -> list[BuiltIn]:
    """Return pictures for training and for validation, 8192 and 2048 unless their numbers are given."""
    splits = ("train", train_n or 8192), ("val", val_n or 2048)
    return [BuiltIn(make(data, n, size, seed, split), masks) for split, n in splits]


def make(data: str, n: int, size: int | tuple[int, int], seed: int = 0, split: str = "train") -> Made:
    """Return built-in pictures by one of the names in `BUILT_IN`."""
    one_of("data", data, BUILT_IN)
    if data == Screens.title:
        return Screens(n, size, seed, split)
    return Scenes(n, size, seed, data.partition(":")[2], split)


def _real(data, size, batches, counts, seed, workers, augment, mean, std) -> tuple[list[Dataset], list[str]]:
    """Open pictures of a folder, a tar or one of timm's data sets, with their transforms, and name their classes."""
    train, val, classes = open_sources(data, batches, seed, workers)
    common = {"input_size": (3, *size), "mean": mean, "std": std, "interpolation": "bicubic"}
    eval_transform = create_transform(**common, crop_pct=0.875 if min(size) > 96 else 1.0)
    settings = AUGMENT[augment]
    train_transform = eval_transform if settings is None else create_transform(**common, is_training=True, **settings)
    kind = Stream if isinstance(train, IterableDataset) else Pictures
    datasets = [
        kind(train, train_transform, counts[0], seed, f"{data} train"),
        kind(val, eval_transform, counts[1], seed, f"{data} val"),
        kind(train, eval_transform, counts[0], seed, f"{data} train"),
    ]
    return datasets, classes


def load_splits(
    train: Dataset, val: Dataset, calibration: Dataset, batch, val_batch, seed, workers, collate: Callable = collate
) -> list[DataLoader]:
    """Return loaders that go by (seed, epoch) and leave the global random numbers alone.

    Training and calibration pictures are shuffled, and their last incomplete batch is dropped.
    """
    loaders = []
    for data, count, shuffle in ((train, batch, True), (val, val_batch, False), (calibration, batch, True)):
        stream, cached = isinstance(data, IterableDataset), isinstance(data, DeviceCache)
        readers = 0 if cached else workers
        loader = DataLoader(
            data,
            batch_size=min(count, len(data)),
            sampler=None if stream else EpochSampler(len(data), seed, shuffle),
            drop_last=shuffle,
            num_workers=readers,
            persistent_workers=readers > 0 and not stream,  # a stream's epoch reaches new workers only
            collate_fn=collate,
            pin_memory=torch.cuda.is_available() and not cached,
            generator=torch.Generator().manual_seed(seed),
        )
        loaders.append(loader)
    return loaders
