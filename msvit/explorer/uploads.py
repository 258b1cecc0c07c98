"""Decoding of uploaded pictures: each becomes 8-bit RGB, or an error that states what is wrong with it."""

import io
import re
import warnings

from PIL import Image

from ..data.images import UNREADABLE, to_rgb

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no others: EPS, for one, would start Ghostscript
MAX_MEGAPIXELS = 64  # decoded, that is 200 MB


class PictureError(ValueError):
    """A file that is no picture, or none that can be shown."""


def read_picture(data: bytes, name: str) -> Image.Image:
    """Return the picture in `data`, upright and over white; `name` is for messages.

    The size is read from the header and checked before a single pixel is decoded.
    """
    if not data:
        raise PictureError(f"{name} is empty; choose a picture")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of large pictures, which are refused below, and of odd metadata
        try:
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        except Image.DecompressionBombError as error:
            pixels = re.search(r"\d+", str(error))
            raise _too_large(name, int(pixels[0]) if pixels else 2 * Image.MAX_IMAGE_PIXELS) from error
        except UNREADABLE as error:
            raise PictureError(
                f"{name} is no picture that can be read here (it begins with {data[:12]!r}); "
                f"choose one of {', '.join(IMAGE_FORMATS)}"
            ) from error
        with image:
            if image.width * image.height > MAX_MEGAPIXELS * 1e6:
                raise _too_large(name, image.width * image.height)
            size = f"{image.format}, {image.width} x {image.height} px"
            try:
                return to_rgb(image)
            except (*UNREADABLE, MemoryError) as error:
                raise PictureError(
                    f"{name} ({size}) is damaged or incomplete: {error}; open it in a viewer and save it anew"
                ) from error


def _too_large(name: str, pixels: int) -> PictureError:
    return PictureError(
        f"{name} has {pixels / 1e6:,.0f} megapixels and was not decoded; the limit is {MAX_MEGAPIXELS}, make it smaller"
    )
