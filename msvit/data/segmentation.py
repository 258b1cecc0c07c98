"""Pictures with label maps for segmentation: scenes, and folders in CamVid's or ADE20K's layout.

Every label map is int64 with classes 0..K-1 and 255 where a pixel is to be ignored.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as T
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torchvision import tv_tensors

from ..checks import DataError, one_of
from . import IGNORE
from .decode import SUFFIXES, opened, to_rgb
from .images import Pictures
from .loaders import BUILT_IN, Batch, Loaders, built_in, collate, load_splits
from .made import Made

PAIRED_AUGMENT = ("none", "light")
_SPLITS = ("train", "training"), ("val", "validation", "valid", "test")
_VOID = ("unlabelled", "unlabeled", "void", "ignore")  # names of classes that are none
# Brostow et al. 2009, in the eleven classes of SegNet (Badrinarayanan et al. 2017).
_CAMVID = ["Sky", "Building", "Pole", "Road", "Pavement", "Tree", "SignSymbol", "Fence", "Car", "Pedestrian"]
_CAMVID += ["Bicyclist", "Unlabelled"]
_NAMES = f'{{"names": ["sky", "road"]}} with the names of label values 0, 1 ... in their order, {IGNORE - 1} at most'
_ADE20K = 150  # classes of SceneParse150 (Zhou et al. 2017); label 0 is "other"


class SegmentationFolder(NamedTuple):
    """What a folder holds: (picture, label map) files of each split, class names, and the meaning of label values."""

    train: list[tuple[Path, Path]]
    val: list[tuple[Path, Path]]
    classes: list[str]
    meaning: np.ndarray  # int64 [256]: class of each label value, 255 to ignore, -1 for values that must not occur


class RandomScale(T.Transform):
    """Resize picture and label map together by one factor, log-uniform in low..high."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low, self.high = low, high

    def make_params(self, flat_inputs: list) -> dict:
        factor = self.low * (self.high / self.low) ** torch.rand(()).item()
        return {"size": [max(1, round(side * factor)) for side in T.functional.get_size(flat_inputs[0])]}

    def transform(self, inpt, params: dict):
        return T.functional.resize(inpt, params["size"])


class Labelled(Pictures):
    """Pictures with label maps: item `key` is (float32 `[3, H, W]`, int64 `[H, W]`, index), as of `Pictures`.

    Files that cannot be decoded are replaced and counted. A label map that contradicts its picture or the
    list of classes ends the run with its name, because nobody can say how many others are wrong.

    Args:
        files: (picture, label map).
        crop: (H, W) of a training picture, or None for whole ones.
    """

    def __init__(self, files, meaning, transform, crop, short: int, n: int, seed: int, label: str):
        super().__init__(files, transform, n, seed, label)
        self.meaning, self.crop, self.short = meaning, crop, short

    def name(self, i: int) -> str:
        """Return the file of picture i."""
        return str(self.source[self.order[i]][0])

    def _read(self, i: int) -> tuple[Image.Image, np.ndarray]:
        picture, labels = self.source[self.order[i]]
        with opened(picture) as image, opened(labels) as values:
            return to_rgb(image), np.asarray(values, np.int64)

    def _prepare(self, image: Image.Image, target: np.ndarray, i: int) -> tuple[Tensor, Tensor]:
        codes = classes_of(target, self.meaning, image, *map(str, self.source[self.order[i]]))
        both = tv_tensors.Image(image), tv_tensors.Mask(codes)
        if self.short:
            both = tuple(T.functional.resize(x, [self.short]) for x in both)
        height, width = both[0].shape[-2:]
        if self.crop and (self.crop[0] > height or self.crop[1] > width):
            raise DataError(
                f"size={self.crop} is larger than {self.name(i)} of {(height, width)} pixels; use a smaller size, or "
                f"short={max(self.crop)} to enlarge the pictures first"
            )
        picture, mask = self.transform(*both)
        return picture.as_subclass(Tensor), mask.as_subclass(Tensor)


def classes_of(values: np.ndarray, meaning: np.ndarray, image: Image.Image, picture: str, labels: str) -> np.ndarray:
    """Return the classes that a label map's values mean, uint8; `picture` and `labels` are the files, for messages."""
    if values.shape != image.size[::-1]:
        raise DataError(
            f"{labels} has shape {values.shape}, its picture {picture} is {image.size[::-1]}; a label map "
            f"holds one number for each pixel of the upright picture"
        )
    codes = np.where((values >= 0) & (values < 256), meaning[values & 255], -1)
    if (codes < 0).any():
        wrong, known = np.unique(values[codes < 0]).tolist(), np.flatnonzero(meaning >= 0).tolist()
        raise DataError(
            f"{labels} holds the values {wrong[:8]}; known are {known[0]}..{known[-2]} and {IGNORE} (ignored)"
        )
    return codes.astype(np.uint8)


def collate_padded(samples: Batch | list[tuple]) -> Batch:
    """Stack (picture, label map, index); smaller ones are padded at bottom and right, with the mean and with 255."""
    if isinstance(samples, Batch):
        return samples
    height, width = (max(labels.shape[d] for _, labels, _ in samples) for d in (0, 1))
    padded = []
    for image, labels, i in samples:
        margins = (0, width - labels.shape[1], 0, height - labels.shape[0])
        padded.append((F.pad(image, margins), F.pad(labels, margins, value=IGNORE), i))
    return collate(padded)


def joint_transform(size: tuple[int, int] | None, augment: str, mean: Sequence[float], std: Sequence[float]):
    """Return a transform of picture and label map together.

    "light" scales by 0.5..2, pads with the mean colour and 255 where the picture became too small, crops and
    flips; "none" crops the centre. Without a size the picture stays whole.
    """
    fill = {tv_tensors.Image: [round(255 * m) for m in mean], tv_tensors.Mask: IGNORE}
    steps = []
    if size and augment == "light":
        crop = T.RandomCrop(size, pad_if_needed=True, fill=fill)
        steps = [RandomScale(0.5, 2.0), crop, T.RandomHorizontalFlip()]
    elif size:
        steps = [T.CenterCrop(size)]
    dtypes = {tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64, "others": None}
    return T.Compose([*steps, T.ToDtype(dtypes, scale=True), T.Normalize(mean, std)])


def open_folder(root: Path) -> SegmentationFolder:
    """Find the files of a folder in CamVid's layout or in ADE20K's, and what its label values mean.

    CamVid: {train,val}/{images,labels}; label values count from 0, and classes called "unlabelled" or "void" are
    ignored. ADE20K: {images,annotations}/{training,validation}; label 0 is ignored and value v is class v - 1.
    Names come from classes.json ({"names": [...]}, in the order of the values) or ADE20K's objectInfo150.txt; CamVid's
    own are known where the folder is called so.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"there is no folder {root}")
    if (root / "annotations").is_dir():
        train, val = (_pairs(root / "images" / s, root / "annotations" / s) for s in ("training", "validation"))
        names, first = _names(root) or [f"class {k + 1}" for k in range(_ADE20K)], 1
    else:
        splits = [next((root / s for s in words if (root / s).is_dir()), None) for words in _SPLITS]
        if None in splits:
            found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
            raise FileNotFoundError(
                f"{root} has neither {{train,val}}/{{images,labels}} nor "
                f"{{images,annotations}}/{{training,validation}}; found: {found}"
            )
        train, val = (_pairs(s / "images", s / "labels") for s in splits)
        names, first = _names(root) or (_CAMVID if root.name.lower().startswith("camvid") else []), 0
        if not names:
            raise ValueError(f"{root} does not name its classes; write {root / 'classes.json'}: {_NAMES}")
    _check_once(train + val)
    meaning, classes = np.full(256, -1), []
    meaning[[0, IGNORE] if first else IGNORE] = IGNORE
    for value, name in enumerate(names, first):
        if name.lower() in _VOID:
            meaning[value] = IGNORE
        else:
            meaning[value] = len(classes)
            classes.append(name)
    if len(classes) < 2:
        raise ValueError(f"{root} has the classes {classes}, and what is called {' or '.join(_VOID)} is none; name two")
    return SegmentationFolder(train, val, classes, meaning)


def _names(root: Path) -> list[str]:
    """Return the names of the label values, empty where the folder does not tell them."""
    path = root / "classes.json"
    own = root / "objectInfo150.txt"
    try:
        if path.is_file():
            names = json.loads(path.read_text())["names"]
        elif own.is_file():
            path, names = own, [line.split("\t")[-1] for line in own.read_text().splitlines()[1:]]
        else:
            return []
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not as expected, {_NAMES}") from error
    if not (isinstance(names, list) and 0 < len(names) < IGNORE and all(isinstance(name, str) for name in names)):
        raise ValueError(f"{path} is not as expected, {_NAMES}")
    return names


def _check_once(files: list[tuple[Path, Path]]):
    """Raise a ValueError if a picture is there twice, by a link to it or to its folder: in training and validation."""
    homes = {folder: os.path.realpath(folder) for folder in {picture.parent for picture, _ in files}}
    seen: dict[str, Path] = {}
    for picture, _ in files:
        real = os.path.join(homes[picture.parent], picture.name)
        real = os.path.realpath(picture) if os.path.islink(real) else real
        if (other := seen.setdefault(real, picture)) != picture:
            raise ValueError(f"{picture} and {other} are the same picture; remove the link")


def _pairs(pictures: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Return each picture with the label map of its stem."""
    for folder in (pictures, labels):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
    maps = {p.stem: p for p in labels.glob("*.png")}
    files = sorted(p for p in pictures.iterdir() if p.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{pictures} holds no pictures ({', '.join(SUFFIXES)})")
    if missing := [p.name for p in files if p.stem not in maps]:
        raise FileNotFoundError(f"{labels} has no label map (.png) for {len(missing)} pictures: {missing[:5]}")
    return [(p, maps[p.stem]) for p in files]


def make_seg_loaders(
    data: str = "scenes:easy",
    size: int | tuple[int, int] = 64,
    batch: int = 32,
    val_batch: int = 32,
    train_n: int = 8192,
    val_n: int = 2048,
    seed: int = 0,
    workers: int = 0,
    augment: str = "none",
    short: int = 0,
    mean: tuple[float, ...] = IMAGENET_DEFAULT_MEAN,
    std: tuple[float, ...] = IMAGENET_DEFAULT_STD,
) -> Loaders:
    """Make loaders of `Batch`es whose targets are label maps; the rest is as in `msvit.data.loaders.make_loaders`.

    Training pictures are crops of `size`; pictures for validation stay whole, and those of a batch are padded
    to the largest with pixels to ignore. A crop larger than its picture is an error.

    Args:
        data: What is built in, as in "scenes:easy", or "folder:ROOT" (see `open_folder`).
        augment: "none" (the centre) or "light" (random scale, crop and flip); built-in ones take "none" only.
        short: side to which the shorter side of all pictures is resized first, 0 to leave them.
    """
    one_of("augment", augment, PAIRED_AUGMENT)
    size = (size, size) if isinstance(size, int) else tuple(size)
    kind, _, rest = data.partition(":")
    if data in BUILT_IN:
        if augment != "none" or short:
            raise ValueError(f"augment={augment!r}, short={short}: built-in pictures are as they are; use 'none' and 0")
        train, val = built_in(data, size, train_n, val_n, seed, masks=True)
        calibration, classes, mean, std = train, train.classes, Made.mean, Made.std
    else:
        if kind != "folder":
            one_of("data", data, (*BUILT_IN, "folder:ROOT"))
        folder = open_folder(Path(rest))

        def labelled(files: list, crop: tuple[int, int] | None, augment: str, n: int, split: str) -> Labelled:
            transform = joint_transform(crop, augment, mean, std)
            return Labelled(files, folder.meaning, transform, crop, short, n, seed, f"{data} {split}")

        train = labelled(folder.train, size, augment, train_n, "train")
        val = labelled(folder.val, None, "none", val_n, "val")
        calibration = labelled(folder.train, size, "none", train_n, "train")
        classes = folder.classes
    loaders = load_splits(train, val, calibration, batch, val_batch, seed, workers, collate_padded)
    return Loaders(*loaders, classes, tuple(mean), tuple(std), size)
