"""Small tools for drawing panels: colours, letters, frames, strips of explanations, and PNG files."""

import io
from functools import cache

import numpy as np
from matplotlib.font_manager import findfont
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
PANEL_WIDTH = 448  # in pixels; on a screen a panel is shown at half of that
INK = (34, 34, 34)
# Nine anchors of cividis (Nuñez, Anderton and Renslow 2018): blue to yellow, ever lighter, to the colour-blind too.
CIVIDIS = np.array([
    (0, 34, 78), (26, 56, 111), (67, 78, 108), (97, 101, 111), (125, 124, 120), (155, 148, 118), (188, 174, 108),
    (222, 201, 88), (254, 232, 56),
])  # fmt: skip


def png(image: Image.Image) -> bytes:
    """Return a PNG file, compressed fast rather than small."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def colours(values: np.ndarray) -> np.ndarray:
    """Return values in [0, 1] as cividis, uint8 `[..., 3]`."""
    at = np.linspace(0, 1, len(CIVIDIS))
    return np.stack([np.interp(values, at, channel) for channel in CIVIDIS.T], -1).round().astype(np.uint8)


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans, which has every sign of class names and comes with matplotlib."""
    return ImageFont.truetype(findfont("DejaVu Sans"), size)


def ink_on(colour: Colour) -> str:
    """Return the ink that can be read on a colour."""
    return "black" if np.dot(colour, (0.299, 0.587, 0.114)) > 140 else "white"


def shortened(text: str, width: float, size: int) -> str:
    """Return the text, or as much of its beginning as is no wider."""
    if font(size).getlength(text) <= width:
        return text
    while text and font(size).getlength(text + "…") > width:
        text = text[:-1].rstrip()
    return text + "…"


def enlarged(image: Image.Image, like: tuple[int, int] | None = None) -> Image.Image:
    """Enlarge to the panels' width, in the proportions of `like`, every pixel a sharp block."""
    width, height = like or image.size
    return image.resize((PANEL_WIDTH, round(PANEL_WIDTH * height / width)), Image.Resampling.NEAREST)


def frame(canvas: ImageDraw.ImageDraw, box: tuple[float, float, float, float], colour: Colour):
    """Draw a thin frame just inside of a box, with a dark seam that sets it off from light pixels."""
    x, y, w, h = box
    canvas.rectangle([x, y, x + w - 1, y + h - 1], None, (0, 0, 0, 120), 1)
    canvas.rectangle([x + 1, y + 1, x + w - 2, y + h - 2], None, (*colour, 255), 2)


def hatched(panel: Image.Image, where: np.ndarray, colour: Colour, line: Colour) -> Image.Image:
    """Return the panel with a hatch over the cells `[h, w]`."""
    if not where.any():
        return panel
    y, x = np.mgrid[: panel.height, : panel.width]
    hatch = np.where(((x + y) % 14 < 4)[..., None], np.uint8(line), np.uint8(colour))
    mask = Image.fromarray(where.astype(np.uint8) * 255).resize(panel.size, Image.Resampling.NEAREST)
    return Image.composite(Image.fromarray(hatch), panel, mask)


def stacked(upper: Image.Image, lower: Image.Image) -> Image.Image:
    """Return two pictures of one width, one below the other."""
    whole = upper.crop((0, 0, upper.width, upper.height + lower.height))
    whole.paste(lower, (0, upper.height))
    return whole


def strip(*lines: str) -> Image.Image:
    """Draw lines of explanation, to stand below a panel."""
    panel = Image.new("RGB", (PANEL_WIDTH, 12 + 28 * len(lines)), "white")
    for row, text in enumerate(lines):
        at = (PANEL_WIDTH / 2, 22 + 28 * row)
        ImageDraw.Draw(panel).text(at, shortened(text, PANEL_WIDTH - 8, 20), INK, font(20), anchor="mm")
    return panel


def legend(entries: list[tuple[Colour, str, str]]) -> Image.Image:
    """Draw swatches, each a colour, a sign on it and a name beside it, as many in a line as fit."""
    panel = Image.new("RGB", (PANEL_WIDTH, 34 * (len(entries) + 1)), "white")  # a line for each; cut below
    canvas, x, y = ImageDraw.Draw(panel), 4, 10
    for colour, sign, name in entries:
        swatch = max(28, font(16).getlength(sign) + 8)
        name = shortened(name, PANEL_WIDTH - swatch - 16, 20)
        wide = swatch + 8 + font(20).getlength(name)
        if x > 4 and x + wide > PANEL_WIDTH - 4:
            x, y = 4, y + 34
        canvas.rectangle([x, y, x + swatch, y + 24], colour, INK, 1)
        canvas.text((x + swatch / 2, y + 13), sign, ink_on(colour), font(16), anchor="mm")
        canvas.text((x + swatch + 8, y + 13), name, INK, font(20), anchor="lm")
        x += wide + 18
    return panel.crop((0, 0, PANEL_WIDTH, y + 34))
