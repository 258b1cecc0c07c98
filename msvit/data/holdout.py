"""A part of the training pictures in place of the validation pictures, for choices that no test split may see."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from .loaders import Loaders, load_splits
from .seeds import permutation


class Subset(Dataset):
    """Some pictures of a data set, which keep their numbers and names. Keys are epoch * n + i, as from samplers."""

    def __init__(self, data: Dataset, indices: np.ndarray):
        self.data, self.indices, self.name = data, indices, data.name
        self.scenes, self.unreadable = getattr(data, "scenes", None), getattr(data, "unreadable", list)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, keys: Sequence[int]) -> Any:
        epochs, i = np.divmod(np.asarray(keys), len(self))
        moved = (epochs * len(self.data) + self.indices[i]).tolist()
        every = getattr(self.data, "__getitems__", None)
        return every(moved) if every else [self.data[key] for key in moved]


def hold_out(loaders: Loaders, share: float, seed: int, workers: int = 0) -> Loaders:
    """Return loaders that evaluate on a share of the training pictures, and train on the rest."""
    data = loaders.train.dataset
    if isinstance(data, IterableDataset):
        raise ValueError(f"holdout={share:g}: these pictures are a stream, nothing of it can be held out")
    held_out, rest = np.split(permutation(len(data), seed, 6), [max(1, round(share * len(data)))])
    if not len(rest):
        raise ValueError(f"holdout={share:g} of {len(data)} training pictures leaves none to train on; hold out fewer")
    evaluated = copy.copy(data)
    evaluated.transform = getattr(loaders.val.dataset, "transform", None)
    datasets = Subset(data, rest), Subset(evaluated, held_out), Subset(loaders.calibration.dataset, rest)
    batch, collate = loaders.train.batch_size, loaders.train.collate_fn
    made = load_splits(*datasets, batch, 2 * batch, seed, workers, collate)
    return Loaders(*made, loaders.classes, loaders.mean, loaders.std, loaders.size)
