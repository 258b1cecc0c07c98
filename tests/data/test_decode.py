"""What is opened as a picture: regular files of known formats and bounded sizes, for training as in the explorer."""

import os
import time

import pytest
import torch
from helpers import bomb, encoded, gradient, write_folder
from PIL import Image

from msvit.data import decode
from msvit.data.decode import MAX_MEGAPIXELS, PictureError, opened
from msvit.data.loaders import make_loaders
from msvit.data.segmentation import make_seg_loaders
from msvit.explorer.sources import folder_source


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


def unreadable(folder):
    loaders = make_loaders(f"folder:{folder}", size=16, batch=4, val_batch=4)
    list(loaders.train)
    (found,) = loaders.unreadable("train")
    return found


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_pipe_called_like_a_picture_is_named_and_not_waited_for(folder):
    os.mkfifo(folder / "train/cat/pipe.png")
    assert "no regular file" in unreadable(folder).reason
    source = folder_source(folder)
    with pytest.raises(PictureError, match="no regular file"):
        source.picture("train/cat/pipe.png", (8, 8))


def test_a_device_is_no_picture(folder):
    (folder / "train/cat/null.png").symlink_to("/dev/null")
    assert "no regular file" in unreadable(folder).reason


def test_postscript_starts_no_program(folder, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("started a program"))
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("started a program"))
    (folder / "train/cat/page.jpg").write_bytes(encoded(gradient(), "EPS"))
    assert "cannot identify" in unreadable(folder).reason


def test_a_picture_too_large_is_refused_by_its_header(folder):
    (folder / "train/cat/large.png").write_bytes(bomb(12000))
    begun = time.process_time()
    assert f"144 megapixels and was not decoded; the limit is {MAX_MEGAPIXELS}" in unreadable(folder).reason
    assert time.process_time() - begun < 2, "decoding takes six seconds"


def test_label_maps_are_opened_alike(tmp_path, monkeypatch):
    for split in ("train", "val"):
        for part, mode in (("images", "RGB"), ("labels", "L")):
            (tmp_path / split / part).mkdir(parents=True)
            for name in "ab":
                Image.new(mode, (16, 16), 0).save(tmp_path / split / part / f"{name}.png")
    (tmp_path / "classes.json").write_text('{"names": ["x", "y"]}')
    (tmp_path / "train/labels/a.png").write_bytes(encoded(gradient(), "EPS"))
    loaders = make_seg_loaders(f"folder:{tmp_path}", size=16, batch=2, val_batch=2)
    list(loaders.train)
    assert len(loaders.unreadable("train")) == 1


def test_the_limit_is_in_pixels(tmp_path, monkeypatch):
    Image.new("RGB", (100, 100)).save(tmp_path / "a.png")
    with opened(tmp_path / "a.png") as image:
        assert image.size == (100, 100)
    monkeypatch.setattr(decode, "MAX_MEGAPIXELS", 0.009)
    with pytest.raises(PictureError, match="a.png has 0 megapixels"), opened(tmp_path / "a.png"):
        pass


def test_broken_validation_files_are_counted(folder):
    for path in list((folder / "val").rglob("*.png"))[:3]:
        path.write_bytes(b"broken")
    loaders = make_loaders(f"folder:{folder}", size=16, batch=4, val_batch=4)
    seen = torch.cat([batch.indices for batch in loaders.val])
    assert int((seen < 0).sum()) == len(loaders.unreadable("val")) == 3
