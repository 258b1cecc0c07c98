"""Painting by strokes, and masks as files."""

import io

import numpy as np
import pytest
from helpers import encoded
from PIL import Image

from msvit.explorer.painting import UNPAINTED, MaskError, Painting, blank, mask_files, read_mask

MASK = np.array([[1, 0, 1], [0, 0, 1]], bool)


def test_strokes_are_undone_and_redone_whole():
    painting = Painting(blank((1, 3)))
    painting.paint([1, -1, -1], stroke=1)
    painting.paint([1, 1, -1], stroke=1)
    painting.paint([1, 1, 0], stroke=2)
    painting.undo()
    assert painting.now == [1, 1, -1]
    painting.undo()
    assert painting.now == blank((1, 3))
    painting.undo()
    assert painting.now == blank((1, 3)), "there is nothing before"
    painting.redo()
    painting.redo()
    painting.redo()
    assert painting.now == [1, 1, 0]


def test_a_new_stroke_ends_what_could_be_redone():
    painting = Painting([0])
    painting.paint([1], stroke=1)
    painting.undo()
    painting.paint([1], stroke=1)  # the number that the browser still had
    painting.redo()
    assert painting.now == [1]
    painting.undo()
    assert painting.now == [0]


def test_what_changes_nothing_is_no_stroke():
    painting = Painting([0, 1])
    painting.paint([0, 1])
    assert not painting.past


@pytest.mark.parametrize("suffix", ["png", "npy"])
def test_masks_come_back_from_their_files(suffix):
    assert read_mask(mask_files(MASK)[suffix], f"mask.{suffix}", (2, 3)) == MASK.astype(int).ravel().tolist()


def test_a_numpy_mask_is_what_the_model_takes():
    loaded = np.load(io.BytesIO(mask_files(MASK)["npy"]))
    assert loaded.dtype == bool
    assert np.array_equal(loaded, MASK)


def test_a_mask_may_leave_regions_to_the_gate():
    file = io.BytesIO()
    np.save(file, np.array([[1, -1], [0, -1]], np.int8))
    assert read_mask(file.getvalue(), "m.npy", (2, 2)) == [1, UNPAINTED, 0, UNPAINTED]
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[0, 0], pixels[1, 0] = 255, (0, 0, 0, 255)
    assert read_mask(encoded(Image.fromarray(pixels)), "m.png", (2, 2)) == [1, UNPAINTED, 0, UNPAINTED]


def test_a_picture_may_have_more_pixels_than_regions():
    large = Image.fromarray(MASK.astype(np.uint8) * 255).resize((48, 32), Image.Resampling.NEAREST)
    assert read_mask(encoded(large), "m.png", (2, 3)) == MASK.astype(int).ravel().tolist()


def npy(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no mask that can be read"),
        (b"text", "no mask that can be read"),
        (npy(MASK)[:40], "no mask that can be read"),
        (npy(np.array([{}], object)), "no mask that can be read"),
        (npy(MASK).replace(b"(2, 3), }" + b" " * 14, b"(99999999999999999,), }"), "no mask that can be read"),
        (npy(np.zeros((2, 3))), "its numbers are float64"),
        (npy(np.zeros((3, 2), bool)), "is 3 x 2; this picture has 2 x 3 regions"),
        (npy(np.full((2, 3), 7)), "holds \\[7\\]"),
        (encoded(Image.new("L", (5, 5))), "is 5 x 5; this picture has 2 x 3 regions"),
    ],
    ids=["empty", "text", "torn", "objects", "beyond memory", "floats", "turned", "sevens", "odd size"],
)
def test_what_is_no_mask_is_refused_with_a_reason(data, reason):
    with pytest.raises(MaskError, match=reason):
        read_mask(data, "mine", (2, 3))
