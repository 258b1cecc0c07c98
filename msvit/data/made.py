"""Pictures made by seed: what data sets of them share, whatever they show.

Picture i is a function of (seed, split, i, size, kind) alone, the same on every machine: its random numbers are those
of `msvit.data.seeds` and every sum is one of integers.
"""

import numpy as np
import torch
from torch.utils.data import Dataset

from ..checks import one_of
from .seeds import hashed

_CACHE_BYTES = 2**31  # a larger data set is made anew at every visit
_SPLITS = {"train": 0x7472, "val": 0x7661}


class Made(Dataset):
    """A map-style data set of n pictures of eight classes: `made[i]` is (float32 `[3, H, W]`, label).

    Labels are balanced: every run of eight pictures from a multiple of eight on has each class once. Pictures
    are kept as uint8 once made, as long as the whole set fits 2 GiB. A subclass paints them.

    Args:
        n: Number of pictures.
        size: H and W in pixels, or (H, W).
        seed: Of the whole set.
        split: "train" or "val": streams of random numbers that share no picture.
        least: Side of the smallest picture.
    """

    mean, std = (128 / 255,) * 3, (64 / 255,) * 3  # a pixel u of 0..255 becomes (u - 128) / 64: exact in float32
    title: str  # what pictures are called in messages
    classes: list[str]
    regions: list[str]  # what the values of a mask mean

    def __init__(self, n: int, size: int | tuple[int, int], seed: int, split: str, least: int):
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        if len(self.size) != 2 or min(self.size) < least:
            raise ValueError(f"size={size}: {self.title} need a height and a width of at least {least} pixels")
        one_of("split", split, _SPLITS)
        if n < 1:
            raise ValueError(f"n={n}: a data set needs at least one picture")
        self.n, self.seed, self.split = n, seed, split
        pixels = self.size[0] * self.size[1]
        self._chunk = max(1, 2**20 // pixels)  # pictures made in one go
        self._chunks: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._cached = 4 * n * pixels <= _CACHE_BYTES

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        images, labels = self.batch([i])
        return images[0], int(labels[0])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_chunks": {}}  # a worker makes its own pictures: quicker than to send them

    def labels(self, indices) -> np.ndarray:
        """Return the labels, int64 `[B]`: a permutation of the eight classes for every eight pictures."""
        i = self._checked(indices)
        turn = hashed(self.seed, _SPLITS[self.split], 1, i // 8).astype(np.int64)
        return ((i % 8) * (turn & 6 | 1) + (turn >> 3)) % 8  # odd multiples permute the residues of eight

    def batch(self, indices) -> tuple[torch.Tensor, torch.Tensor]:
        """Return many pictures at once: float32 `[B, 3, H, W]` and labels int64 `[B]`."""
        pixels = torch.from_numpy(self._rows(indices, 0))
        return pixels.float().sub_(128).mul_(1 / 64), torch.from_numpy(self.labels(indices))

    def masks(self, indices) -> np.ndarray:
        """Return the segmentation masks uint8 `[B, H, W]`: 0 background, label + 1 object, 9 distractor or decoy."""
        return self._rows(indices, 1)

    def mask(self, i: int) -> np.ndarray:
        """Return the segmentation mask of one picture, uint8 `[H, W]`."""
        return self.masks([i])[0]

    def object_regions(self, indices, patch: int, scale: int = 2) -> np.ndarray:
        """Return True for the patches that need fine tokens, bool `[B, h, w]`, or `[h, w]` for a single index.

        The complement is the oracle's coarse mask. A size that is no multiple of `patch` is padded at bottom and right.
        """
        shown, (h, w) = self._decides(self.masks(np.atleast_1d(indices)), scale), self.size
        inside = np.pad(shown, ((0, 0), (0, -h % patch), (0, -w % patch)))
        touched = inside.reshape(len(shown), -(-h // patch), patch, -(-w // patch), patch).any((2, 4))
        return touched if np.ndim(indices) else touched[0]

    def name(self, i: int) -> str:
        """Return what to call picture i in a message."""
        return f"{self.title} seed {self.seed} {self.split} #{i}"

    def _checked(self, indices) -> np.ndarray:
        i = np.asarray(indices, np.int64)
        if i.size and (i.min() < 0 or i.max() >= self.n):
            raise IndexError(f"index {i.min() if i.min() < 0 else i.max()} is outside 0..{self.n - 1}")
        return i

    def _make(self, i: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self._render(hashed(self.seed, _SPLITS[self.split], 0, i), self.labels(i))

    def _render(self, keys: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return uint8 pictures `[B, 3, H, W]` and masks `[B, H, W]` by the hashes of their numbers and the labels."""
        raise NotImplementedError

    def _decides(self, masks: np.ndarray, scale: int) -> np.ndarray:
        """Return which pixels tell the class, and do not any more in the means of scale x scale pixels."""
        raise NotImplementedError

    def _rows(self, indices, which: int) -> np.ndarray:
        """Return pictures (`which` 0) or masks (1) of the indices, from the cache where there is one."""
        i = self._checked(indices)
        if not self._cached or not len(i):
            return np.ascontiguousarray(self._make(i)[which])
        for c in set((i // self._chunk).tolist()) - self._chunks.keys():
            self._chunks[c] = self._make(np.arange(c * self._chunk, min(self.n, (c + 1) * self._chunk)))
        return np.stack([self._chunks[j // self._chunk][which][j % self._chunk] for j in i.tolist()])
