"""Pictures to choose from: photographs of packages, folders, and folders with label maps."""

import json

import numpy as np
import pytest
from helpers import gate_of, segmenter_of
from PIL import Image

from msvit.data import IGNORE
from msvit.data.decode import PictureError
from msvit.explorer import sources
from msvit.explorer.models import LoadedModel
from msvit.explorer.sources import built_in_sources, folder_source
from msvit.explorer.state import run_gate

GREY = (120, 130, 140)


def test_photographs_come_with_packages():
    source = built_in_sources()["photographs"]
    assert source.names()[:4] == ["a cat", "coffee", "an astronaut", "a rocket"]
    for name in source.names():
        picture = source.picture(name, (224, 160))
        assert picture.image.size == (160, 224)
        assert np.asarray(picture.image).std() > 20


def test_a_folder_of_pictures(tmp_path):
    (tmp_path / "inner").mkdir()
    Image.new("RGB", (9, 9), GREY).save(tmp_path / "inner/a.png")
    (tmp_path / "notes.txt").write_text("no picture")
    source = folder_source(tmp_path)
    assert source.names() == ["inner/a.png"]
    (tmp_path / "inner/a.png").unlink()
    with pytest.raises(PictureError, match="inner/a.png cannot be read"):
        source.picture("inner/a.png", (8, 8))
    with pytest.raises(PictureError, match="holds no picture"):
        folder_source(tmp_path)
    for name in (tmp_path / "none", tmp_path / ("x" * 300), "~nobody/pictures", "a\0b"):
        with pytest.raises(PictureError, match="there is no folder"):
            folder_source(name)


def test_of_a_very_large_folder_the_first_pictures_are_shown(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(sources, "SIGN", 4)
    for folder in ("a", "a/b", "c"):
        (tmp_path / folder).mkdir()
        for i in range(4):
            (tmp_path / folder / f"{i}.png").touch()
            (tmp_path / folder / f"{i}.txt").touch()
    whole = folder_source(tmp_path, lambda *counts: told.append(counts))
    assert len(whole.names()) == 12
    assert whole.names() == sorted(whole.names())
    assert whole.note == ""
    assert [seen for _, seen in told] == [4, 8, 12, 16, 20, 24]
    monkeypatch.setattr(sources, "MOST_PICTURES", 5)
    some = folder_source(tmp_path)
    assert len(some.names()) == 5
    assert set(some.names()) < set(whole.names())
    assert "these are 5 pictures among" in some.note
    monkeypatch.setattr(sources, "MOST_FILES", 7)
    assert "among 7" in folder_source(tmp_path).note
    (tmp_path / "d").mkdir()
    for i in range(9):
        (tmp_path / "d" / f"{i}.txt").touch()
    with pytest.raises(PictureError, match="no picture among its first 7 files"):
        folder_source(tmp_path / "d")


def labelled_folder(root, size=(30, 40)):
    """CamVid's layout: the left half is class 0, the right class 2, the top row of value 1 is none."""
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (root / split / part).mkdir(parents=True)
        values = np.zeros(size, np.uint8)
        values[:, size[1] // 2 :], values[0] = 2, 1
        Image.fromarray(values * 100).convert("RGB").save(root / split / "images/a.jpg", quality=100)
        Image.fromarray(values).save(root / split / "labels/a.png")
    (root / "classes.json").write_text(json.dumps({"names": ["left", "void", "right"]}))
    return root


def test_label_maps_of_a_folder_go_with_their_pictures(tmp_path):
    source = folder_source(labelled_folder(tmp_path))
    assert source.names() == ["val/images/a.jpg", "train/images/a.jpg"], "label maps are no pictures"
    picture = source.picture("val/images/a.jpg", (30, 30))
    assert picture.regions == ("left", "right")
    assert picture.labels.shape == (30, 30)
    assert np.array_equal(picture.labels[1:], np.tile([0] * 15 + [1] * 15, (29, 1)))
    assert (picture.labels[0] == IGNORE).all()
    assert np.asarray(picture.image)[5, [2, 27], 0].tolist() == pytest.approx([0, 200], abs=3)
    loaded = LoadedModel.of("two", segmenter_of(classes=["left", "right"]))
    assert gate_of(loaded).truth is None
    assert run_gate(loaded, source.picture("val/images/a.jpg", loaded.size)).truth is not None
    path = tmp_path / "val/labels/a.png"
    Image.fromarray(np.full((30, 40), 7, np.uint8)).save(path)
    with pytest.raises(PictureError, match=r"a.png holds the values \[7\]"):
        source.picture("val/images/a.jpg", (30, 30))
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(path)
    with pytest.raises(PictureError, match=r"a.png has shape \(40, 30\), its picture val/images/a.jpg is \(30, 40\)"):
        source.picture("val/images/a.jpg", (30, 30))
    path.write_bytes(b"torn")
    with pytest.raises(PictureError, match="a.png, the label map of val/images/a.jpg, cannot be read"):
        source.picture("val/images/a.jpg", (30, 30))
