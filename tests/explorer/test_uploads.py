"""Uploaded pictures: hostile ones are refused with a reason, odd ones are shown right."""

import numpy as np
import pytest
from helpers import bomb, encoded, gradient
from PIL import Image

from msvit.data.decode import MAX_MEGAPIXELS, PictureError
from msvit.explorer.sources import PictureSource
from msvit.explorer.uploads import read_picture

GREY = (120, 130, 140)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("text.png", b"this is no picture, whatever its name", "text.png is no picture.*choose one of PNG"),
        ("empty.png", b"", "empty.png is empty"),
        ("page.html.png", b"<html><script>alert(1)</script>", "is no picture"),
        ("cut.jpg", encoded(gradient(), "JPEG")[:-200], r"cut.jpg \(JPEG, 64 x 48 px\) is damaged or incomplete"),
        ("cut.png", encoded(gradient())[:60], "cut.png .*is damaged or incomplete"),
        ("figure.eps", encoded(gradient(), "EPS"), "is no picture"),
        ("floats.tif", encoded(Image.new("F", (8, 8)), "TIFF"), "floats"),
        ("bomb.png", bomb(30000), f"bomb.png has 900 megapixels and was not decoded; the limit is {MAX_MEGAPIXELS}"),
        ("large.png", bomb(8200), "large.png has 67 megapixels and was not decoded"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.count(".") else "",
)
def test_what_is_no_picture_is_refused_with_a_reason(name, data, reason):
    with pytest.raises(PictureError, match=reason):
        read_picture(data, name)


@pytest.mark.parametrize(
    ("data", "pixel"),
    [
        (encoded(Image.new("1", (9, 9), 1)), (255, 255, 255)),
        (encoded(Image.new("I;16", (9, 9), 257 * 100)), (100, 100, 100)),
        (encoded(Image.new("L", (9, 9), 7)), (7, 7, 7)),
        (encoded(Image.new("CMYK", (9, 9), (0, 0, 0, 255)), "TIFF"), (0, 0, 0)),
        (encoded(Image.new("CMYK", (9, 9), (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
        (encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0))), (255, 255, 255)),
        (encoded(Image.new("RGBA", (9, 9), (200, 0, 0, 255))), (200, 0, 0)),
        (encoded(Image.new("LA", (9, 9), (0, 0))), (255, 255, 255)),
        (encoded(Image.new("P", (9, 9), 0), "GIF"), (0, 0, 0)),
        (encoded(Image.new("RGB", (1, 1), GREY)), GREY),
        (encoded(Image.new("RGB", (3000, 1), GREY)), GREY),
        (encoded(Image.new("RGB", (9, 9), GREY), "WEBP", lossless=True), GREY),
        (encoded(Image.new("RGB", (9, 9), GREY), "BMP"), GREY),
    ],
    ids=["1-bit", "16-bit", "grey", "CMYK TIFF", "CMYK JPEG", "clear", "opaque", "grey and clear", "palette", "1 x 1",
         "3000 x 1", "WEBP", "BMP"],
)  # fmt: skip
def test_odd_pictures_are_shown_right(tmp_path, data, pixel):
    picture = PictureSource({"odd": data}).picture("odd", (48, 64))
    assert picture.image.size == (64, 48)
    assert picture.image.mode == "RGB"
    assert {tuple(p) for p in np.asarray(picture.image).reshape(-1, 3).tolist()} == {pixel}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation):
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste((200, 0, 0), (0, 0, 32, 16))
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transposition that undoes what EXIF's number asks for
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_picture(encoded(stored, "PNG", exif=exif), "turned.png")
    assert np.array_equal(np.asarray(image), np.asarray(upright))
