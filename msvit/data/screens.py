"""Screens: desktops made by seed, plain ground with windows, text and plots; a word of small text is the class.

On a flat ground lie a few windows of flat colours: some have lines of random words, some a plot, and all of them much
empty space. On top of them lies a label of one line with one of eight words of four letters; no other word of a screen
has four letters. Letters are those of Pillow's bitmap font, 6 x 11 pixels each. Nothing is noisy: neighbouring regions
of plain ground are equal to the last bit, as on real screens, and two screens that differ in the class alone differ in
the letters of one word alone.
"""

from functools import cache

import numpy as np
from PIL import ImageFont

from .made import Made
from .seeds import Draws

WORDS = ("open", "shut", "left", "move", "save", "send", "stop", "wait")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
GLYPH = (11, 6)  # height and width of a letter in pixels
LINE, BAR = 14, 8  # pixels from a line of text to the next, height of a window's title bar
WINDOWS, LINES, PER_LINE = 3, 4, 4  # windows of a screen, lines of text of a window and words of a line, at most
LENGTHS = (2, 3, 5, 6)  # letters of a word that is no class
BLANK, WINDOW = len(LETTERS), 9  # number of the letter that is none; value of a mask


@cache
def _glyphs() -> np.ndarray:
    """Return the letters and a blank, bool `[37, 11, 6]`."""
    font, shapes = ImageFont.load_default_imagefont(), np.zeros((len(LETTERS) + 1, *GLYPH), bool)
    for shape, letter in zip(shapes, LETTERS, strict=False):
        mask = font.getmask(letter, "1")
        drawn = np.array(mask, np.uint8).reshape(mask.size[::-1])[: GLYPH[0], : GLYPH[1]] > 0
        shape[: drawn.shape[0], : drawn.shape[1]] = drawn
    return shapes


def _write(image: np.ndarray, letters: np.ndarray, y: int, x: int, colour: np.ndarray):
    """Paint what of a line of text, given by the numbers of its letters, lies within a picture `[3, H, W]`."""
    text = np.concatenate(_glyphs()[letters], axis=1)
    window = image[:, y : y + GLYPH[0], x : x + text.shape[1]]
    np.copyto(window, colour[:, None, None], where=text[: window.shape[1], : window.shape[2]], casting="unsafe")


def _plot(image: np.ndarray, heights: np.ndarray, colour: np.ndarray):
    """Draw a curve of one pixel's width through `heights`, in 256ths, over the width of a picture `[3, H, W]`."""
    _, h, w = image.shape
    at = np.arange(w) * (len(heights) - 1) * 256 // w
    k, f = at // 256, at % 256
    y = h - 1 - (heights[k] * (256 - f) + heights[k + 1] * f) // 256 * h // 257
    for x in range(w):
        low, high = sorted((y[max(x - 1, 0)], y[x]))
        image[:, low : high + 1, x] = colour[:, None]


class _Window:
    """Random numbers of one window of many screens: where it lies, its colours, and what it shows."""

    def __init__(self, draw: Draws, size: tuple[int, int]):
        self.sides = np.stack([draw(side * 3 // 8, side * 3 // 4, 1)[:, 0] for side in size], 1)
        self.corners = (np.array(size) - self.sides) * draw(0, 255, 2) // 255
        self.bar, (self.fill, self.ink) = draw(64, 192, 3), _colours(draw)
        self.plotted, self.heights = draw(0, 2, 1)[:, 0] == 0, draw(16, 240, 8)
        self.lines, self.words = draw(1, LINES, 1)[:, 0], draw(1, PER_LINE, LINES)
        self.lengths = np.array(LENGTHS)[draw(0, len(LENGTHS) - 1, LINES, PER_LINE)]
        self.letters = draw(0, len(LETTERS) - 1, LINES, PER_LINE * (max(LENGTHS) + 1))

    def paint(self, b: int, image: np.ndarray, mask: np.ndarray):
        """Paint the window of screen b."""
        (y, x), (h, w) = self.corners[b], self.sides[b]
        part = image[:, y : y + h, x : x + w]
        part[:], part[:, :BAR] = self.fill[b][:, None, None], self.bar[b][:, None, None]
        mask[y : y + h, x : x + w] = WINDOW
        if self.plotted[b]:
            _plot(part[:, BAR + 4 : -4, 4:-4], self.heights[b], self.ink[b])
            return
        for line in range(self.lines[b]):
            blanks = np.cumsum(self.lengths[b, line, : self.words[b, line]] + 1) - 1
            letters = self.letters[b, line].copy()
            letters[blanks] = BLANK
            _write(part[:, :, :-3], letters[: blanks[-1]], BAR + 4 + LINE * line, 4, self.ink[b])


def _colours(draw: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Return colours of ground and ink `[B, 3]`: dark on light, or light on dark."""
    light = draw(0, 1, 1) == 1
    return np.where(light, draw(216, 248, 3), draw(8, 56, 3)), np.where(light, draw(0, 64, 3), draw(176, 255, 3))


class Screens(Made):
    """A data set of n screens, see `Made`; a mask has label + 1 at the word that is the class, and 9 at the windows.

    Args:
        n, size, seed, split: As in `Made`; size at least 64.
    """

    title, classes, regions = "screens", list(WORDS), ["ground", *WORDS, "window"]

    def __init__(self, n: int, size: int | tuple[int, int] = 128, seed: int = 0, split: str = "train"):
        super().__init__(n, size, seed, split, least=64)

    def _render(self, keys: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((len(keys), 3, *self.size), np.uint8)
        masks = np.zeros((len(keys), *self.size), np.uint8)
        draw, word = Draws(keys), np.array([GLYPH[0], GLYPH[1] * len(WORDS[0])])
        images[:] = draw(48, 160, 3)[:, :, None, None]
        windows = [_Window(draw, self.size) for _ in range(WINDOWS)]
        fill, ink = _colours(draw)
        corners = (np.array(self.size) - word - 8) * draw(0, 255, 2) // 255
        for b, (image, mask) in enumerate(zip(images, masks, strict=True)):
            for window in windows:
                window.paint(b, image, mask)
            (y, x), (h, w) = corners[b], word
            image[:, y : y + h + 8, x : x + w + 8] = fill[b][:, None, None]
            mask[y : y + h + 8, x : x + w + 8] = WINDOW
            _write(image, np.array([LETTERS.index(letter) for letter in WORDS[labels[b]]]), y + 4, x + 4, ink[b])
            mask[y + 4 : y + 4 + h, x + 4 : x + 4 + w] = labels[b] + 1
        return images, masks

    def _decides(self, masks: np.ndarray, scale: int) -> np.ndarray:
        return (masks > 0) & (masks < WINDOW)
