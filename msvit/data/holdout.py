"""A part of the training pictures in place of the validation pictures, for choices that no test split may see."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from .loaders import Loaders, Splits, load_splits
from .seeds import permutation


class Subset(Dataset):
    """Some pictures of a data set, which keep their numbers and names. Keys are epoch * n + i, as from samplers."""

    def __init__(self, data: Dataset, indices: np.ndarray):
        self.data, self.indices, self.name, self.unreadable = data, indices, data.name, data.unreadable
        self.scenes = getattr(data, "scenes", None)

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
    order = permutation(len(data), seed, 6)
    count = max(1, round(share * len(data)))
    evaluated = copy.copy(data)
    evaluated.transform = getattr(loaders.val.dataset, "transform", None)
    rest = Subset(loaders.calibration.dataset, order[count:])
    splits = Splits(
        Subset(data, order[count:]), Subset(evaluated, order[:count]), rest, loaders.classes, loaders.mean, loaders.std
    )
    batch = loaders.train.batch_size
    return load_splits(splits, loaders.size, batch, 2 * batch, seed, workers, loaders.train.collate_fn)
