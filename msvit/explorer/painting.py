"""Painting: what was painted on each picture, stroke by stroke, and masks as files."""

import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ..data.decode import UNREADABLE

UNPAINTED = -1


class MaskError(ValueError):
    """A file that is no mask of the picture shown."""


@dataclass
class Painting:
    """What is painted on a picture: a value for each region, row by row, and the strokes that led to it.

    Values are 1 for coarse, 0 for fine, UNPAINTED elsewhere. What is painted under one number is one stroke.
    """

    now: list[int]
    past: list[list[int]] = field(default_factory=list)
    future: list[list[int]] = field(default_factory=list)
    stroke: int | None = None

    def paint(self, values: list[int], stroke: int | None = None):
        """Take what is painted now; None is a stroke of its own."""
        if values == self.now:
            return
        if stroke is None or stroke != self.stroke:
            self.past.append(self.now)
            self.future.clear()
        self.now, self.stroke = list(values), stroke

    def undo(self):
        """Go back to before the last stroke, if there is one."""
        self._move(self.past, self.future)

    def redo(self):
        """Take back what was undone last."""
        self._move(self.future, self.past)

    def _move(self, source: list, target: list):
        if source:
            target.append(self.now)
            self.now, self.stroke = source.pop(), None


def blank(grid: tuple[int, int]) -> list[int]:
    """Return the values of a picture with nothing painted on it."""
    return [UNPAINTED] * (grid[0] * grid[1])


def mask_files(coarse: np.ndarray) -> dict[str, bytes]:
    """Return decisions, bool `[h, w]`, as files by their suffix: a pixel per region (white is coarse), and NumPy's own.

    `model.run(images, torch.from_numpy(numpy.load(file)))` takes the latter.
    """
    png, npy = io.BytesIO(), io.BytesIO()
    Image.fromarray(coarse.astype(np.uint8) * 255).save(png, "PNG")
    np.save(npy, coarse)
    return {"png": png.getvalue(), "npy": npy.getvalue()}


def read_mask(data: bytes, name: str, grid: tuple[int, int]) -> list[int]:
    """Return what a mask's file paints on a grid `(h, w)`.

    Of NumPy's `[h, w]`: true or 1 is coarse, false or 0 fine, -1 leaves it to the gate. Of a picture: light is coarse,
    dark fine, transparent leaves it; a pixel for each region, or a whole number of them along both sides.
    """
    try:
        values = _from_numpy(data) if data[:6] == b"\x93NUMPY" else _from_picture(data, grid)
    except (*UNREADABLE, MemoryError) as error:
        raise MaskError(f"{name} is no mask that can be read ({error}); choose a PNG, or a .npy of bool") from error
    h, w = grid
    if values.shape != grid:
        size = " x ".join(map(str, values.shape))
        raise MaskError(f"{name} is {size}; this picture has {h} x {w} regions, of which a PNG may show several pixels")
    if not np.isin(values, (UNPAINTED, 0, 1)).all():
        raise MaskError(f"{name} holds {np.unique(values)[:4].tolist()} …; a mask holds 1 (coarse), 0 (fine) and -1")
    return values.ravel().tolist()


def _from_numpy(data: bytes) -> np.ndarray:
    values = np.load(io.BytesIO(data), allow_pickle=False)
    if values.dtype != bool and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"its numbers are {values.dtype}")
    return values.astype(int)


def _from_picture(data: bytes, grid: tuple[int, int]) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        height, width = image.height, image.width
        if height * width > 64e6:
            raise ValueError(f"it has {height} x {width} pixels")
        grey, alpha = (np.asarray(part) for part in image.convert("LA").split())
    values = np.where(alpha < 128, UNPAINTED, grey > 127).astype(int)
    if values.shape[0] % grid[0] or values.shape[1] % grid[1]:
        return values
    rows, columns = values.shape[0] // grid[0], values.shape[1] // grid[1]
    return values[rows // 2 :: rows, columns // 2 :: columns]
