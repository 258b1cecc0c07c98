"""Decoding of uploaded pictures: each becomes 8-bit RGB, or an error that states what is wrong with it."""

import io
import warnings

from PIL import Image

from ..data.decode import PICTURE_FORMATS, UNREADABLE, PictureError, opened, to_rgb


def read_picture(data: bytes, name: str) -> Image.Image:
    """Return the picture in `data`, upright and over white; `name` is for messages."""
    if not data:
        raise PictureError(f"{name} is empty; choose a picture")
    size = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        try:
            with opened(io.BytesIO(data), name) as image:
                size = f"{image.format}, {image.width} x {image.height} px"
                return to_rgb(image)
        except PictureError:
            raise
        except (*UNREADABLE, MemoryError) as error:
            raise PictureError(
                f"{name} ({size}) is damaged or incomplete: {error}; open it in a viewer and save it anew"
                if size
                else f"{name} is no picture that can be read here (it begins with {data[:12]!r}); "
                f"choose one of {', '.join(PICTURE_FORMATS)}"
            ) from error
