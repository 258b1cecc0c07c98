"""Scenes: pictures made by seed, in which fine detail decides and its place varies.

A scene is a smooth background, a few flat-coloured distractor blobs and one object: a blob of about a quarter
of the short side, filled with a fine texture whose pattern is the class. Blobs and textures lie on the grid
of 2 x 2 pixel blocks and every block of a fine texture has zero mean, so halving the resolution erases the
class *exactly*: the scenes of two classes that agree in everything else have bit-identical halves. At half
resolution an object is one more flat blob. The difficulty "scales" has also textures twice and four times as wide, on a
grid of 4 x 4 pixels, which are erased by averaging 4 x 4 and 8 x 8: so the quadtree that is ideal is known.
"""

from typing import NamedTuple

import numpy as np

from ..checks import one_of
from .made import Made
from .seeds import GOLDEN, Draws, mix


class Difficulty(NamedTuple):
    """What scenes of one difficulty show. Every sum of colours stays in 0..255: nothing is ever clipped."""

    classes: tuple[str, ...]  # patterns; a "wide" one has twice the size and can be read at half resolution
    contrast: tuple[int, int]  # amplitude of the texture in grey levels, drawn per picture
    noise: int  # log2 of the number of grey levels of the uniform noise on every pixel
    width: float  # of a blob, in quarters of the short side
    flat: int  # distractors of one colour
    decoys: int  # distractors with a fine texture that is no class and does not average to zero
    shift: bool  # the texture starts anywhere on the 2 x 2 grid, not always at a multiple of its period
    sizes: tuple[int, ...] = (8,)  # of blobs, in eighths of the width, one drawn for each
    cell: int = 2  # side in pixels of the grid on which blobs lie
    details: tuple[int, ...] = (1,) * 8  # side in pixels of what a pattern is made of: what averages more loses it
    least: int = 16  # side of the smallest picture


_FINE = ("rows", "columns", "checks", "broad rows", "broad columns", "broad checks", "weave", "rings")
_MIXED = _FINE[:3] + ("weave", "wide rows", "wide columns", "wide checks", "wide weave")
_SCALES = (*_FINE[:3], "wide rows", "wide columns", "wide checks", "vast rows", "vast columns")
DIFFICULTIES = {
    "easy": Difficulty(_FINE, (56, 56), 0, 1.0, flat=2, decoys=0, shift=False),
    "middle": Difficulty(_MIXED, (4, 32), 6, 1.0, flat=2, decoys=0, shift=False),
    "hard": Difficulty(_FINE, (12, 36), 6, 0.8, flat=2, decoys=2, shift=True),
    "scales": Difficulty(
        _SCALES,
        (32, 56),
        0,
        1.0,
        flat=3,
        decoys=0,
        shift=False,
        sizes=(5, 8, 16),
        cell=4,
        details=(1, 1, 1, 2, 2, 2, 4, 4),
        least=64,
    ),
}


def _textures() -> dict[str, np.ndarray]:
    """Return the patterns of +1 and -1, each `[16, 16]`, of period 4 (wide ones: 8, vast ones: 16).

    A fine one is put together from 2 x 2 blocks of zero mean: two rows h, two columns v, or a checker d.
    """
    h, v = np.array([[1, 1], [-1, -1]]), np.array([[1, -1], [1, -1]])
    d = h * v
    blocks = {
        "rows": [[h, h], [h, h]],
        "columns": [[v, v], [v, v]],
        "checks": [[d, d], [d, d]],
        "broad rows": [[h, h], [-h, -h]],
        "broad columns": [[v, -v], [v, -v]],
        "broad checks": [[d, -d], [-d, d]],
        "weave": [[h, v], [v, h]],
        "rings": [[h, -h], [v, -v]],
    }
    fine = {name: np.tile(np.block(b), (4, 4)) for name, b in blocks.items()}
    wide = {
        f"{word} {name}": t.repeat(k, 0).repeat(k, 1)[:16, :16]
        for word, k in (("wide", 2), ("vast", 4))
        for name, t in fine.items()
    }
    y, x = np.mgrid[:16, :16]
    decoys = {f"decoy {k}": np.where((x + (2 * k - 1) * y) % 4 < 2, 1, -1) for k in (1, 2)}  # slanted stripes
    return {name: t.astype(np.int16) for name, t in (fine | wide | decoys).items()}


_TEXTURES = _textures()


def _spline(n: int, nodes: int) -> np.ndarray:
    """Return weights `[n, nodes]` of the uniform quadratic B-spline, integers that sum to 128 in each row."""
    t = (2 * np.arange(n) + 1) * (nodes - 2) * 32 // n  # 64ths of the distance between two nodes
    k, f = t // 64, t % 64
    out = np.zeros((n, nodes), np.int64)
    rows = np.arange(n)
    out[rows, k] = (64 - f) ** 2 // 64
    out[rows, k + 2] = f**2 // 64
    out[rows, k + 1] = 128 - out[rows, k] - out[rows, k + 2]
    return out


def _background(draw: Draws, height: int, width: int, top: int) -> np.ndarray:
    """Return smooth colour fields in 64..top, uint8 `[B, 3, H, W]`.

    Separable splines as two matrix products. Their sums are integers below 2^24, so that float32 holds them
    exactly in whatever order a BLAS adds them up.
    """
    nodes = draw(64, top, 3, 6, 6).astype(np.float32)
    wy, wx = _spline(height, 6).astype(np.float32), _spline(width, 6).astype(np.float32)
    fields = np.matmul(wy, np.matmul(nodes, wx.T))
    fields *= np.float32(2**-14)
    return fields.astype(np.uint8)


def _blobs(draw: Draws, count: int, side: int, unit: int, level: Difficulty) -> np.ndarray:
    """Return shapes of blobs, unions of three discs, in cells of the level's grid: bool `[B, count, side, side]`.

    Args:
        side: of the window, in cells.
        unit: width of a blob in 16ths of a pixel, before its size is drawn.
    """
    at = (2 * np.arange(side) + 1 - side) * 8 * level.cell  # centres of the cells from the window's centre
    oy, ox = (draw(-unit // 6, unit // 6, count, 3)[..., None, None] for _ in range(2))
    radius = draw(unit * 5 // 16, unit * 7 // 16, count, 3)[..., None, None]
    if len(level.sizes) > 1:
        size = np.array(level.sizes)[draw(0, len(level.sizes) - 1, count, 1)][..., None, None]
        oy, ox, radius = (length * size // 8 for length in (oy, ox, radius))
    return ((at[:, None] - oy) ** 2 + (at - ox) ** 2 <= radius**2).any(2)


def render(
    keys: np.ndarray, labels: np.ndarray, size: tuple[int, int], level: Difficulty
) -> tuple[np.ndarray, np.ndarray]:
    """Paint scenes: uint8 pictures `[B, 3, H, W]` and their masks `[B, H, W]`.

    The labels choose the object's pattern and nothing else.
    """
    height, width = (n + -n % 4 for n in size)
    draw, unit = Draws(keys), int(min(size) * level.width) * 4
    cell, most = level.cell, unit * max(level.sizes) // 8
    side = -(-most * 5 // 4 // (16 * cell))  # in cells; a blob spans up to 29/24 of its unit
    count, object_at = level.flat + level.decoys + 1, level.flat + level.decoys  # the object comes last, on top
    top = 192 - 2**level.noise
    images, masks = _background(draw, height, width, top), np.zeros((len(keys), height, width), np.uint8)
    shapes = _blobs(draw, count, side, unit, level).repeat(cell, 2).repeat(cell, 3)
    ys, xs = (cell * draw(0, n // cell - side, count) for n in (height, width))
    colours = draw(64, top, count, 3)[..., None, None].astype(np.int16)
    contrast, phase, decoy = draw(*level.contrast, 1).astype(np.int16), draw(0, 3, count), draw(1, 2, count)
    shift_y, shift_x = 2 * (phase & 1) * level.shift, (phase & 2) * level.shift
    side *= cell
    tiles = -(-side // 16) + 1
    planes = {name: np.tile(texture, (tiles, tiles)) for name, texture in _TEXTURES.items()}
    for b, label in enumerate(labels.tolist()):
        for k in range(count):
            y, x, colour = ys[b, k], xs[b, k], colours[b, k]
            if k >= level.flat:
                name = level.classes[label] if k == object_at else f"decoy {decoy[b, k]}"
                row, column = (y + shift_y[b, k]) % 16, (x + shift_x[b, k]) % 16
                colour = colour + contrast[b] * planes[name][row : row + side, column : column + side]
            window = np.s_[..., y : y + side, x : x + side]
            np.copyto(images[b][window], colour, where=shapes[b, k], casting="unsafe")
            np.copyto(masks[b][window], label + 1 if k == object_at else 9, where=shapes[b, k])
    if level.noise:
        counter = np.arange(1, 3 * height * width // 8 + 1, dtype=np.uint64)  # eight bytes a word
        words = mix(mix(keys)[:, None] + counter * GOLDEN).astype("<u8", copy=False)
        images += words.view(np.uint8).reshape(images.shape) >> np.uint8(8 - level.noise)
    return images[..., : size[0], : size[1]], masks[..., : size[0], : size[1]]


class Scenes(Made):
    """A data set of n scenes, see `Made`.

    Args:
        n, size, seed, split: As in `Made`; size at least 16, for "scales" 64.
        difficulty: "easy", where the class is gone at half resolution; "middle", where half of the classes
            are still readable there, and contrast varies under noise; "hard", with smaller and fainter
            objects, textures that start anywhere and decoys with a fine texture of no class; "scales", with objects
            of three sizes and textures at three scales, which are gone at a half, at a quarter, or at neither.
    """

    def __init__(
        self,
        n: int,
        size: int | tuple[int, int] = 64,
        seed: int = 0,
        difficulty: str = "easy",
        split: str = "train",
    ):
        self.difficulty, self.title = one_of("difficulty", difficulty, DIFFICULTIES), f"scenes:{difficulty}"
        super().__init__(n, size, seed, split, DIFFICULTIES[difficulty].least)
        self.classes = list(DIFFICULTIES[difficulty].classes)
        self.regions = ["background", *self.classes, "distractor"]

    def _render(self, keys: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return render(keys, labels, self.size, DIFFICULTIES[self.difficulty])

    def _decides(self, masks: np.ndarray, scale: int) -> np.ndarray:
        """See `Made`: where one scale's texture is still there in the means, its objects need nothing finer."""
        details = DIFFICULTIES[self.difficulty].details
        return np.array([0, *(detail < scale for detail in details), 0], bool)[masks]
