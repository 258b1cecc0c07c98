"""Pictures kept on an accelerator: the same as from disk, and crops that are what they are said to be."""

import numpy as np
import pytest
import torch
from helpers import epoch, same, write_folder

from msvit.data import device_cache as bank
from msvit.data.device_cache import DeviceCache, boxes, crop, draws
from msvit.data.loaders import make_loaders
from msvit.training.loop import train
from msvit.training.recipe import Recipe

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "p", train=7, val=5)


@pytest.fixture
def space(monkeypatch):
    """A processor that counts as an accelerator with room."""
    monkeypatch.setattr(bank, "room", lambda device: 1 << 30)


def loaders_of(folder, **changes):
    settings = {"data": f"folder:{folder}", "size": 16, "batch": 4, "val_batch": 4, "device": CPU} | changes
    return make_loaders(**settings)


@pytest.mark.parametrize("workers", [0, 1])
def test_without_augmentation_a_kept_picture_is_the_one_on_disk(folder, space, workers):
    kept, read = loaders_of(folder, workers=workers), loaders_of(folder, device=None)
    assert isinstance(kept.train.dataset, DeviceCache)
    assert not isinstance(read.train.dataset, DeviceCache)
    for e in (0, 3):
        assert same(epoch(kept, e), epoch(read, e))
    assert same(list(kept.val), list(read.val))
    assert kept.names("val", [1]) == read.names("val", [1])


def test_where_pictures_are_kept(folder, space, monkeypatch):
    assert not isinstance(loaders_of(folder, augment="timm").train.dataset, DeviceCache)
    assert isinstance(loaders_of(folder, augment="timm").val.dataset, DeviceCache)
    monkeypatch.setattr(bank, "room", lambda device: 14 * 3 * 16 * 16)
    light = loaders_of(folder, augment="light")
    assert isinstance(light.train.dataset, DeviceCache), "in bytes they fit"
    assert not isinstance(light.val.dataset, DeviceCache), "as floats they do not"
    monkeypatch.undo()
    assert not isinstance(loaders_of(folder).train.dataset, DeviceCache), "a processor is no accelerator"


def test_a_crop_is_a_function_of_seed_epoch_and_picture(folder, space):
    def pictures(e, **changes):
        batches = epoch(loaders_of(folder, augment="light", **changes), e)
        return {int(i): image for b in batches for i, image in zip(b.indices, b.images, strict=True)}

    one = pictures(1)
    for changes in ({}, {"batch": 7}):
        other = pictures(1, **changes)
        assert all(torch.allclose(one[i], other[i], atol=1e-5) for i in one.keys() & other.keys())
    for e, changes in ((2, {}), (1, {"seed": 1})):
        other = pictures(e, **changes)
        assert not any(torch.allclose(one[i], other[i], atol=1e-2) for i in one.keys() & other.keys())


def test_files_that_cannot_be_read_are_named(folder, space):
    (folder / "train" / "cat" / "3.png").write_bytes(b"no picture")
    loaders = loaders_of(folder, batch=14)
    batch = epoch(loaders, 0)[0]
    assert (batch.indices < 0).sum() == 1
    assert [bad.name.endswith("cat/3.png") for bad in loaders.unreadable("train")] == [True]


def dice(count):
    return draws(4, 0, 7, np.zeros(count, np.int64), np.arange(count))


@pytest.mark.parametrize("aspect", [1.0, 2.0, 0.4])
def test_boxes_lie_in_the_picture_and_are_as_large_as_they_should_be(aspect):
    at = boxes(dice(2000), torch.full((2000,), aspect))
    area, ratio = at.width * at.height, aspect * at.width / at.height
    assert 0.5 - 1e-6 < area.min() < 0.51
    assert 0.99 < area.max() < 1 + 1e-6
    assert area.mean() == pytest.approx(0.75, abs=0.01)
    assert (at.side < 0).double().mean() == pytest.approx(0.5, abs=0.04)
    for centre, extent in ((at.x, at.width), (at.y, at.height)):
        assert (centre - extent / 2).min() > -1e-6
        assert (centre + extent / 2).max() < 1 + 1e-6
    if aspect == 1:
        for centre, extent in ((at.x, at.width), (at.y, at.height)):
            place = ((centre - extent / 2) / (1 - extent))[extent < 0.9]
            assert place.mean() == pytest.approx(0.5, abs=0.02)
            assert place.std() == pytest.approx(12**-0.5, abs=0.02)
        assert ratio.min() > 0.75 - 1e-6
        assert ratio.max() < 4 / 3 + 1e-6


def test_crops_show_their_boxes():
    """The first channel tells where a pixel is from left to right, the second from top to bottom."""
    side, at = 32, boxes(dice(200), torch.ones(200))
    place = (torch.arange(side) + 0.5) / side
    down, across = torch.meshgrid(place, place, indexing="ij")
    out = crop(torch.stack([across, down, across]).expand(200, -1, -1, -1), at)
    x, y = (
        (c[:, None] + (place - 0.5) * extent[:, None]) for c, extent in ((at.x, at.width * at.side), (at.y, at.height))
    )
    inner = slice(4, -4)  # at the border, a cubic bends
    assert (out[:, 0] - x[:, None])[..., inner].abs().max() < 0.01
    assert (out[:, 1] - y[:, :, None])[:, inner].abs().max() < 0.01


def test_the_whole_picture_is_a_box_and_the_flipped_one_too():
    picture = torch.rand(2, 3, 16, 16)
    last = torch.tensor([[0.5 - 1e-7, 0.3, 0.2, 0.9], [1 - 1e-7, 0.3, 0.2, 0.9]])
    out = crop(picture, boxes(last, torch.ones(2)))
    torch.testing.assert_close(out[0], picture[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(out[1], picture[1].flip(-1), atol=1e-3, rtol=0)


@pytest.mark.long
def test_a_run_trains_on_kept_pictures(folder, space, tmp_path):
    recipe = Recipe(
        data=f"folder:{folder}", size=32, model="tiny", augment="light", batch=4, train_n=0, val_n=0, epochs_dense=1,
        epochs=1, device="cpu",
    )  # fmt: skip
    first, second = (train(recipe, tmp_path / name, progress=False) for name in ("a", "b"))
    assert first.summary["pictures"] == 10
    assert first.metrics[-1]["train_loss"] == second.metrics[-1]["train_loss"]
