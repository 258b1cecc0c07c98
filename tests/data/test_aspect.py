"""Pictures at their own aspect ratio: about as large as the others, and whole."""

import numpy as np
import pytest
import torch
from helpers import write_folder
from PIL import Image

from msvit.data.aspect import KeepAspect, whole_pictures
from msvit.data.holdout import hold_out
from msvit.data.loaders import make_loaders
from msvit.data.segmentation import make_seg_loaders

FORMS = [(40, 30), (30, 40), (64, 64), (200, 50), (7, 300)]  # width and height


@pytest.fixture
def folder(tmp_path):
    write_folder(tmp_path)
    for i, (width, height) in enumerate(FORMS):
        pixels = np.full((height, width, 3), 128, np.uint8)
        pixels[:, 0], pixels[:, -1], pixels[0], pixels[-1] = 255, 255, 255, 255
        Image.fromarray(pixels).save(tmp_path / f"val/cat/form{i}.png")
    return tmp_path


@pytest.mark.parametrize(("width", "height"), FORMS)
def test_the_area_is_that_of_the_size_and_the_ratio_the_pictures_own(width, height):
    rows, columns = KeepAspect((64, 48), (0.5,) * 3, (0.5,) * 3).sides(height, width)
    assert rows * columns == pytest.approx(64 * 48, rel=1 / min(rows, columns))  # what rounding does
    assert columns / rows == pytest.approx(width / height, rel=0.1)


def test_nothing_is_cropped(folder):
    """The frame that was drawn round pictures is still there on all sides."""
    loaders = make_loaders(f"folder:{folder}", size=64, val_batch=4)
    seen = {}
    for images, targets, indices in whole_pictures(loaders):
        assert isinstance(images, list)
        assert targets.shape == indices.shape == (len(images),)
        seen |= dict(zip(loaders.names("val", indices), images, strict=True))
    assert len(seen) == len(loaders.val.dataset)
    for i in range(len(FORMS)):
        image = next(image for name, image in seen.items() if name.endswith(f"form{i}.png"))
        middle = image[0, image.shape[1] // 2, image.shape[2] // 2]
        for side in (image[0, 0], image[0, -1], image[0, :, 0], image[0, :, -1]):
            assert side.mean() > middle


def test_a_square_picture_is_what_it_was(tmp_path):
    write_folder(tmp_path, size=(80, 80))
    loaders = make_loaders(f"folder:{tmp_path}", size=64)
    (whole,), (cropped,) = whole_pictures(loaders), loaders.val
    torch.testing.assert_close(torch.stack(whole.images), cropped.images)
    assert torch.equal(whole.targets, cropped.targets)


def test_a_broken_file_is_replaced_and_counted(folder):
    (folder / "val/cat/form0.png").write_bytes(b"no picture")
    loaders = make_loaders(f"folder:{folder}", size=64)
    (batch,) = whole_pictures(loaders)
    assert (batch.indices < 0).sum() == 1
    assert [bad.name.rpartition("/")[2] for bad in loaders.unreadable("val")] == ["form0.png"]


def test_held_out_pictures_too_and_what_has_no_sides_of_its_own_is_refused(folder):
    held = hold_out(make_loaders(f"folder:{folder}", size=64, batch=4), 0.5, 0)
    (batch,) = whole_pictures(held)
    assert {image.shape[1:] for image in batch.images} == {(55, 74)}
    with pytest.raises(ValueError, match="aspect='keep' is for pictures in files"):
        whole_pictures(make_loaders("scenes:easy", val_n=8))
    with pytest.raises(ValueError, match="aspect='keep' is for pictures in files"):
        whole_pictures(make_seg_loaders("scenes:easy", val_n=8))
