"""The one way in which a picture file is opened: a regular file of a known format and a bounded size, as 8-bit RGB."""

import contextlib
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

PICTURE_FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "PPM",
)  # no others: EPS, for one, would start Ghostscript
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm")
MAX_MEGAPIXELS = 64  # decoded, that is 200 MB
# What PIL's decoders raise on broken files; a fault of the transforms is not among what is caught.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, LookupError, OverflowError)
UNREADABLE += (struct.error, zlib.error, Image.DecompressionBombError)


class PictureError(ValueError):
    """A file that is no picture, or none that can be shown."""


@contextlib.contextmanager
def opened(file: Path | BinaryIO, name: str = "") -> Iterator[Image.Image]:
    """Open a picture; its size is read from the header and checked before a single pixel is decoded.

    Args:
        file: A path, which must lead to a regular file (a pipe would be waited for), or an open file.
        name: For messages.
    """
    name = name or str(file)
    if isinstance(file, Path):
        check_regular(file, name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # of what is refused below
        try:
            image = Image.open(file, formats=PICTURE_FORMATS)
        except Image.DecompressionBombError as error:
            pixels = re.search(r"\d+", str(error))
            raise _too_large(name, int(pixels[0]) if pixels else 2 * Image.MAX_IMAGE_PIXELS) from error
    with image:
        if image.width * image.height > MAX_MEGAPIXELS * 1e6:
            raise _too_large(name, image.width * image.height)
        yield image


def check_regular(path: Path, name: str):
    """Raise unless a path leads to a regular file."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise PictureError(f"{name} is no regular file")


def _too_large(name: str, pixels: int) -> PictureError:
    return PictureError(
        f"{name} has {pixels / 1e6:,.0f} megapixels and was not decoded; the limit is {MAX_MEGAPIXELS}, make it smaller"
    )


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the 8-bit RGB picture that a file means: upright, 16 bits scaled, transparency over white."""
    image.load()
    with contextlib.suppress(*UNREADABLE):  # a damaged EXIF block spoils no pixel
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL's own conversion clips at 255
        grey = (np.asarray(image).astype(np.float64) / 257).round().clip(0, 255)
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("pixels are floats without a known range")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
