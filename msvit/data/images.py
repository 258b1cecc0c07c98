"""Reading real pictures through timm's readers, so that broken files are counted, named and replaced."""

import contextlib
import os
import random
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..checks import DataError, first_line
from .class_folders import check_class_folders, check_tar
from .decode import SUFFIXES, UNREADABLE, opened, to_rgb
from .seeds import hashed, permutation

KINDS = ("folder:", "tar:", "hfds/", "hfids/", "tfds/", "wds/", "torch/")
_TRAIN, _VAL = ("train", "training"), ("val", "validation", "valid", "eval", "test")
_TYPES = ", ".join(SUFFIXES)
_RETRIES = 50  # neighbours to try in place of an unreadable file before the whole data set is called so


class Unreadable(NamedTuple):
    """A file that could not be read, and why."""

    name: str
    reason: str


@contextlib.contextmanager
def seeded(*words: int) -> Iterator[None]:
    """Seed the random numbers of Python, numpy and torch's CPU inside, and leave them outside as they were."""
    word = int(hashed(*words)[0])
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    random.seed(word)
    np.random.seed(word & 0xFFFFFFFF)  # noqa: NPY002 (timm's transforms draw from it)
    torch.default_generator.manual_seed(word)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])


class Pictures(Dataset):
    """Pictures of a data set of timm's (or torchvision's): item `key` is (image, target, index).

    The key is epoch * n + i; picture i is transformed with random numbers seeded by (seed, epoch, i). If file
    i cannot be read, the next readable one stands in, and the index is ~i = -1 - i instead of i.

    Args:
        source: what timm's `create_dataset` gives.
        n: how many of its pictures to use, 0 for all; which ones and in which mixed order is fixed, whatever
            the seed.
        label: what to call the data set in messages.
    """

    def __init__(self, source: Dataset, transform: Callable, n: int, seed: int, label: str):
        self.source, self.transform, self.seed, self.label = source, transform, seed, label
        self.order = permutation(len(source), 3)[: n or None]
        self._failed = torch.zeros(len(self.order), dtype=torch.bool).share_memory_()  # workers write, we read
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, key: int) -> tuple[torch.Tensor, int, int]:
        epoch, i = divmod(key, len(self))
        for j in range(i, i + min(_RETRIES, len(self))):
            try:
                image, target = self._read(j % len(self))
            except UNREADABLE:
                self._failed[j % len(self)] = True
                continue
            with seeded(self.seed, epoch, i):
                return *self._prepare(image, target, j % len(self)), i if i == j else ~i
        raise DataError(
            f"{j - i + 1} files in a row cannot be read, the first is {self.name(i)} ({self._why(i)}); "
            f"check that {self.label} holds pictures"
        )

    def name(self, i: int) -> str:
        """Return the file of picture i."""
        if hasattr(self.source, "filename"):
            with contextlib.suppress(KeyError, TypeError):  # a Hugging Face data set may have no paths
                return str(self.source.filename(int(self.order[i]), absolute=True))
        return f"{self.label} #{self.order[i]}"

    def unreadable(self) -> list[Unreadable]:
        """Return what could not be read so far, here or in a worker."""
        return [Unreadable(self.name(i), self._why(i)) for i in self._failed.nonzero()[:, 0].tolist()]

    def _why(self, i: int) -> str:
        try:
            self._read(i)
        except UNREADABLE as error:
            return f"{type(error).__name__}: {error}"
        return "read well at another attempt"

    def _prepare(self, image: Image.Image, target: int, i: int) -> tuple[torch.Tensor, int]:
        """Augment what was read of file i; an error here ends the run."""
        return self.transform(image), target

    def _read(self, i: int) -> tuple[Image.Image, int]:
        reader = getattr(self.source, "reader", self.source)
        if self._pid != os.getpid() and hasattr(reader, "tar_state"):  # forked: file offsets must not be shared
            for state in [reader.tar_state] if reader.root_is_tar else reader.tar_state.values():
                _forget(state)
        self._pid = os.getpid()
        if isinstance(reader, ReaderImageFolder):  # which would open whatever bears the name, a pipe too
            path, target = reader.samples[int(self.order[i])]
            with opened(Path(path)) as image:
                return to_rgb(image), int(target)
        file, target = reader[int(self.order[i])][:2]
        if isinstance(file, Image.Image):
            return to_rgb(file), int(target)
        with file, opened(file, self.name(i)) as image:
            return to_rgb(image), int(target)


def _forget(state) -> None:
    """Let go of the open files of one of timm's tars and of the tars in it."""
    state.reset()
    for child in state.children.values():
        _forget(child)


class Stream(IterableDataset):
    """A data set of timm's that is read from front to end, in the order that timm gives to (seed, epoch).

    Its items are those of `Pictures`; the index is a running number, for each worker on its own.
    """

    def __init__(self, source: IterableDataset, transform: Callable, n: int, seed: int, label: str):
        self.source, self.transform, self.seed, self.label, self.epoch = source, transform, seed, label, 0
        self.n = min(n or len(source), len(source))

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, int]]:
        info = get_worker_info()
        numbers = range(info.id, self.n, info.num_workers) if info else range(self.n)
        for i, (image, target) in zip(numbers, self.source, strict=False):
            with seeded(self.seed, self.epoch, i):
                image = self.transform(to_rgb(image))
            yield image, int(target), i

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self.source.set_epoch(epoch)

    def name(self, i: int) -> str:
        """Return a running number: streams do not tell their files."""
        return f"{self.label}, picture {i} of the stream"


def open_sources(data: str, batches: tuple[int, int], seed: int, workers: int) -> tuple[Dataset, Dataset, list[str]]:
    """Open "folder:ROOT", "tar:ROOT" or "NAME:ROOT" with a name for timm's `create_dataset`.

    Args:
        batches: pictures in a training and in a validation batch; readers of streams want to know.

    Returns:
        Training and validation pictures as timm reads them, and the names of their classes.
    """
    name, _, root = data.partition(":")
    local = name in ("folder", "tar")
    if (local or root) and not os.path.isdir(root or "?"):
        raise FileNotFoundError(f"data={data!r}: there is no folder {root!r}")
    if name.startswith("torch/") and not root:
        raise ValueError(f"data={data!r} does not say where the pictures are; write {data}:/path")
    if local:
        parts = [_part(Path(root), words, ".tar" if name == "tar" else "") for words in (_TRAIN, _VAL)]
        if name == "folder":
            check_class_folders(parts)
        splits = [_local(part) for part in parts]
    else:
        each = zip((_TRAIN, _VAL), batches, strict=True)
        splits = [_named(name, root, words, batch, seed, workers) for words, batch in each]
    train, val = (_classes(source, root) for source in splits)
    if not train:
        raise ValueError(f"data={data!r} does not name its classes; write them to ROOT/classes.txt, one per line")
    if len(train) == 1:
        raise ValueError(f"data={data!r} has a single class, {train[0]!r}: nothing to learn; use two or more")
    if train != val:
        only = [", ".join(sorted(set(a) - set(b))[:5]) or "none" for a, b in ((train, val), (val, train))]
        raise ValueError(
            f"data={data!r}: training and validation differ in their classes; only in training: {only[0]}; "
            f"only in validation: {only[1]}"
        )
    return *splits, train


def _part(root: Path, words: Sequence[str], suffix: str) -> Path:
    """Return the first folder (or tar) of these names."""
    part = next((root / (w + suffix) for w in words if (root / (w + suffix)).exists()), None)
    if part is None:
        found = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
        raise FileNotFoundError(f"{root} has no {words[0]}{suffix} (nor {', '.join(words[1:])}); found: {found}")
    return part


def _local(part: Path) -> Dataset:
    """Open a tar, or a folder: CLASS/picture, and every CLASS with at least one."""
    if part.is_file():
        try:
            source = create_dataset("", root=str(part))
        except (tarfile.TarError, RuntimeError, AssertionError, ValueError, EOFError) as error:
            raise ValueError(f"{part} is no tar of CLASS/picture that can be read: {first_line(error)}") from error
        inner = (
            (child and os.path.splitext(child.path)[0] or "", file.path) for file, _, child in source.reader.samples
        )
        check_tar(part, (os.path.join(*names) for names in inner))
        return source
    there = {p.name for p in part.iterdir() if p.is_dir() and not p.name.startswith(".")}
    if not there:
        raise ValueError(f"{part} has no classes; expected pictures in {part.name}/CLASS/")
    try:
        source = create_dataset("", root=str(part), search_split=False, input_key=";".join(SUFFIXES))
    except RuntimeError as error:  # timm's word for no picture at all
        raise ValueError(f"{part}: no CLASS in {part.name}/CLASS/ holds a picture ({_TYPES})") from error
    if odd := sorted(there ^ source.reader.class_to_idx.keys()):
        raise ValueError(
            f"{part}: every CLASS in {part.name}/CLASS/ needs pictures ({_TYPES}), directly in its folder; "
            f"this does not hold for {', '.join(repr(o or part.name) for o in odd[:5])}"
        )
    return source


def _named(name: str, root: str, words: Sequence[str], batch: int, seed: int, workers: int) -> Dataset:
    """Open a data set by timm's name for it: the first split of these names that it has."""
    stream = name.partition("/")[0] in ("hfids", "tfds", "wds")
    if stream and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise ValueError(f"data={name!r} is a stream, which processes cannot share; use a folder, a tar or hfds")
    settings = {"is_training": words == _TRAIN, "batch_size": batch, "seed": seed} if stream else {}
    refusals = []
    for word in words:
        try:
            source = create_dataset(name, root=root or None, split=word, **settings)
        except ImportError as error:
            raise ImportError(f"data={name!r} needs a package that is not there: {error}") from error
        except (ValueError, TypeError, RuntimeError, AssertionError, LookupError, OSError) as error:  # readers differ
            refusals.append(f"{word}: {first_line(error)}")
            continue
        if stream:
            source.set_loader_cfg(num_workers=workers)
        return source
    raise ValueError(f"data={name!r} cannot be opened; " + "; ".join(refusals))


def _classes(source: Dataset, root: str) -> list[str]:
    """Return the names of the classes in the order of their numbers, empty where nobody knows them."""
    reader = getattr(source, "reader", source)
    index = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    if index:
        return sorted(index, key=index.get)
    names = Path(root, "classes.txt")
    return names.read_text().splitlines() if root and names.is_file() else []
