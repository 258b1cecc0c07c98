"""Pictures with label maps: both move together, and labels that cannot be right end the run by name."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from msvit.data.loaders import set_epoch
from msvit.data.segmentation import IGNORE, collate_padded, joint_transform, make_seg_loaders, open_folder

NAMES = ["sky", "road", "Void", "car"]


def picture(values):
    """A picture whose red channel is 60 times the label: what moves apart shows."""
    return Image.fromarray(np.stack([values * 60, values * 0, values * 0], -1).astype(np.uint8))


def write(root, layout, names=("a", "b", "c", "d"), size=(24, 32), high=4, first=0):
    rng = np.random.default_rng(1)
    for split in ("train", "val") if layout == "camvid" else ("training", "validation"):
        parts = (
            (f"{split}/images", f"{split}/labels")
            if layout == "camvid"
            else (f"images/{split}", f"annotations/{split}")
        )
        for part in parts:
            (root / part).mkdir(parents=True)
        for name in names:
            blocks = rng.integers(first, high, (size[0] // 8, size[1] // 8))
            values = blocks.repeat(8, 0).repeat(8, 1)
            picture(values).save(root / parts[0] / f"{name}.png")
            Image.fromarray(values.astype(np.uint8)).save(root / parts[1] / f"{name}.png")
    return root


@pytest.fixture
def camvid(tmp_path):
    root = write(tmp_path / "camvid", "camvid")
    (root / "classes.json").write_text(json.dumps({"names": NAMES}))
    return root


def settings(root, **changes):
    return {"data": f"folder:{root}", "size": (16, 24), "batch": 2, "val_batch": 2} | changes


def red(images, loaders):
    return (images[:, 0] * loaders.std[0] + loaders.mean[0]) * 255


def test_camvids_layout(camvid):
    loaders = make_seg_loaders(**settings(camvid))
    assert loaders.classes == ["sky", "road", "car"]  # "Void" is none
    assert loaders.steps == 2
    value = torch.tensor([0, 60, 180] + [120] * 253)  # red of each class; of the ignored
    for loader, shape in ((loaders.train, (16, 24)), (loaders.val, (24, 32))):
        for batch in loader:
            assert batch.images.shape == (2, 3, *shape)
            assert batch.images.dtype == torch.float32
            assert batch.targets.shape == (2, *shape)
            assert batch.targets.dtype == torch.int64
            assert set(batch.targets.unique().tolist()) <= {0, 1, 2, IGNORE}
            assert torch.allclose(red(batch.images, loaders), value[batch.targets].float(), atol=1e-3)
    assert loaders.names("val", [0])[0].startswith(str(camvid / "val/images"))


def test_ade20ks_layout(tmp_path):
    root = write(tmp_path / "ade", "ade20k", high=5)
    loaders = make_seg_loaders(**settings(root))
    assert len(loaders.classes) == 150
    for batch in loaders.val:
        expected = (red(batch.images, loaders) / 60).round().long()
        assert torch.equal(batch.targets, torch.where(expected == 0, IGNORE, expected - 1))
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"] + [f"{k}\t0\t0\t0\t0\tthing {k}" for k in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(lines))
    assert open_folder(root).classes[:2] == ["thing 1", "thing 2"]
    (root / "objectInfo150.txt").write_text("\n".join(lines * 2))
    with pytest.raises(ValueError, match="objectInfo150.txt is not as expected"):
        open_folder(root)


@pytest.mark.parametrize(
    "text",
    ["[]", '["a", "b"]', "{}", '{"names": []}', '{"names": [1, 2]}', '{"names": "ab"}', "{", "3"]
    + [json.dumps({"names": [f"c{i}" for i in range(256)]}), "[" * 100_000],
    ids=lambda text: text[:20],
)
def test_names_that_are_none(tmp_path, text):
    root = write(tmp_path / "pictures", "camvid")
    (root / "classes.json").write_text(text)
    with pytest.raises(ValueError, match=r"classes.json is not as expected, {.names.: \[.sky., .road.\]}") as caught:
        open_folder(root)
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_does_not_get_camvids_names_unless_it_is_called_so(tmp_path):
    root = write(tmp_path / "pictures", "camvid")
    with pytest.raises(ValueError, match="does not name its classes; write .*classes.json"):
        open_folder(root)
    (root / "classes.json").write_text('{"names": ["void", "thing"]}')
    with pytest.raises(ValueError, match=r"has the classes \['thing'\]"):
        open_folder(root)


def test_camvid_without_names_has_segnets_classes(tmp_path):
    folder = open_folder(write(tmp_path / "camvid", "camvid"))
    assert len(folder.classes) == 11
    assert folder.classes[3] == "Road"
    assert folder.meaning[[0, 10, 11, 255, 12]].tolist() == [0, 10, 255, 255, -1]


def test_scenes_with_masks():
    loaders = make_seg_loaders(train_n=8, val_n=5, batch=4, val_batch=4)
    scenes = loaders.train.dataset.scenes
    assert loaders.classes == scenes.regions
    for batch in loaders.train:
        assert torch.equal(batch.targets, torch.from_numpy(scenes.masks(batch.indices).astype(np.int64)))
        assert torch.equal(batch.images, scenes.batch(batch.indices)[0])
    image, target, i = loaders.val.dataset[6]
    assert i == 1
    assert image.shape == (3, 64, 64)
    assert torch.equal(target, torch.from_numpy(loaders.val.dataset.scenes.mask(1)).long())


def test_augmentation_moves_both_together(camvid):
    """Wherever a label is not ignored, the red channel is its own, up to the mixed pixels at a label's edge."""
    loaders = make_seg_loaders(**settings(camvid, size=16, augment="light"))
    value = torch.tensor([0.0, 60, 180])
    dataset, kept, seen = loaders.train.dataset, [], set()
    for key in range(60):
        image, target, _ = dataset[key]
        assert image.shape[1:] == target.shape == (16, 16)
        known = target != IGNORE
        near = (red(image[None], loaders)[0] - value[target.clamp(max=2)]).abs() < 2
        kept.append((near & known).sum() / known.sum().clamp(min=1))
        seen.add(image.numpy().tobytes())
    assert len(seen) == 60
    assert sum(kept) / 60 > 0.8


def test_both_are_flipped_half_of_the_time(tmp_path):
    root = write(tmp_path / "camvid_ramp", "camvid", names="a")
    columns = np.arange(4).repeat(8)[None].repeat(24, 0)  # labels grow from left to right
    picture(columns).save(root / "train/images/a.png")
    Image.fromarray(columns.astype(np.uint8)).save(root / "train/labels/a.png")
    loaders = make_seg_loaders(**settings(root, size=(24, 32), augment="light", batch=1))
    falling = 0
    for key in range(40):
        image, target, _ = loaders.train.dataset[key]
        for row in (target[12][target[12] != IGNORE], red(image[None], loaders)[0, 12][target[12] != IGNORE]):
            falling += bool(row[0] > row[-1])
    assert 20 < falling < 60
    assert falling % 2 == 0


def test_a_picture_scaled_below_the_crop_is_padded_with_pixels_to_ignore(camvid):
    loaders = make_seg_loaders(**settings(camvid, size=(24, 32), augment="light"))
    padded = 0
    for key in range(40):
        image, target, _ = loaders.train.dataset[key]
        outside = (target == IGNORE) & (image.abs().amax(0) < 0.02)  # the mean colour, which no class has
        padded += bool(outside.any())
    assert 5 < padded < 35


def test_epochs_and_seeds(camvid):
    how = settings(camvid, size=16, augment="light")
    runs = [make_seg_loaders(**how), make_seg_loaders(**how), make_seg_loaders(**how, seed=1)]
    contents = []
    for loaders, e in zip(runs, (3, 3, 3), strict=True):
        set_epoch(loaders.train, e)
        contents.append([torch.cat([b.images for b in loaders.train]), torch.cat([b.targets for b in loaders.train])])
    assert all(torch.equal(x, y) for x, y in zip(contents[0], contents[1], strict=True))
    assert not torch.equal(contents[0][0], contents[2][0])


def test_short_side_and_padding_of_a_mixed_batch(tmp_path):
    root = write(tmp_path / "camvid_mixed", "camvid", size=(24, 32))
    tall = np.zeros((40, 16), np.uint8)
    picture(tall).save(root / "val/images/e.png")
    Image.fromarray(tall).save(root / "val/labels/e.png")
    loaders = make_seg_loaders(**settings(root, val_batch=5))
    (batch,) = loaders.val
    assert batch.images.shape == (5, 3, 40, 32)
    row = loaders.names("val", batch.indices).index(str(root / "val/images/e.png"))
    assert (batch.targets[row, :, :16] == 0).all()
    assert (batch.targets[row, :, 16:] == IGNORE).all()
    assert not batch.images[row, :, :, 16:].any()
    (batch,) = make_seg_loaders(**settings(root, val_batch=5, short=12, size=12)).val
    assert batch.images.shape == (5, 3, 30, 16)
    single = collate_padded([(torch.ones(3, 2, 2), torch.ones(2, 2, dtype=torch.int64), 4)])
    assert single.indices.tolist() == [4]


def test_unreadable_pictures_and_maps_are_counted(camvid):
    (camvid / "train/images/b.png").write_bytes(b"")
    (camvid / "train/labels/c.png").write_bytes((camvid / "train/labels/c.png").read_bytes()[:-30])
    loaders = make_seg_loaders(**settings(camvid))
    batches = list(loaders.train)
    assert sum(int((b.indices < 0).sum()) for b in batches) == 2
    assert sorted(f.name[-5:] for f in loaders.unreadable("train")) == ["b.png", "c.png"]


def link(path, to):
    path.unlink() if path.is_file() else shutil.rmtree(path)
    path.symlink_to(to)


def turn(path):
    """A picture that its EXIF block turns, whose label map was drawn without."""
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(path) as image:
        image.load()
        image.save(path, exif=exif)


def relabel(root, values):
    Image.fromarray(np.asarray(values)).save(root / "train/labels/a.png")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (
            lambda r: relabel(r, np.full((24, 32), 9, np.uint8)),
            r"labels/a.png holds the values \[9\]; known are 0..3 and 255",
        ),
        (lambda r: relabel(r, np.full((24, 32), 300, np.uint16)), r"labels/a.png holds the values \[300\]"),
        (
            lambda r: relabel(r, np.zeros((24, 30), np.uint8)),
            r"labels/a.png has shape \(24, 30\), its picture .*\(24, 32\)",
        ),
        (lambda r: relabel(r, np.zeros((24, 32, 3), np.uint8)), "one number for each pixel"),
        (
            lambda r: turn(r / "train/images/a.png"),
            r"has shape \(24, 32\), its picture .*\(32, 24\).* of the upright picture",
        ),
        (lambda r: (r / "val/labels/b.png").unlink(), r"no label map \(.png\) for 1 pictures: \['b.png'\]"),
        (lambda r: [p.unlink() for p in (r / "val/images").iterdir()], "val/images holds no pictures"),
        (lambda r: (r / "val/labels").rename(r / "val/masks"), "there is no folder .*val/labels"),
        (lambda r: link(r / "train/images/a.png", r / "val/images/a.png"), "images/a.png are the same picture; remove"),
        (lambda r: link(r / "train/images", r / "val/images"), "are the same picture; remove the link"),
        (lambda r: (r / "val").rename(r / "other"), "has neither {train,val}.*found: classes.json, other, train"),
        (lambda r: r.rename(r.parent / "moved"), "there is no folder .*camvid"),
    ],
)
def test_folders_that_are_not_as_they_should_be(camvid, damage, words):
    damage(camvid)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        list(make_seg_loaders(**settings(camvid)).train)


@pytest.mark.parametrize("augment", ["none", "light"])
def test_a_crop_larger_than_the_picture_is_refused(camvid, augment):
    with pytest.raises(ValueError, match=r"size=\(28, 24\) is larger than .*\.png of \(24, 32\) pixels; use a smaller"):
        list(make_seg_loaders(**settings(camvid, size=(28, 24), augment=augment)).train)
    assert list(make_seg_loaders(**settings(camvid, size=(28, 24), augment=augment, short=28)).train)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            {"data": "camvid:/x"},
            "data='camvid:/x' is not known. There are: scenes:easy, .*, folder:ROOT",
        ),
        ({"augment": "timm"}, "augment='timm' is not known. There are: none, light"),
        ({"augment": "light"}, "built-in pictures are as they are"),
        ({"short": 32}, "built-in pictures are as they are"),
    ],
)
def test_refusals(how, words):
    with pytest.raises(ValueError, match=words):
        make_seg_loaders(**how)


def test_a_whole_picture_keeps_its_size():
    image = tv_tensors.Image(torch.zeros(3, 5, 7, dtype=torch.uint8))
    out, mask = joint_transform(None, "none", (0.5,) * 3, (0.5,) * 3)(image, tv_tensors.Mask(torch.ones(5, 7).byte()))
    assert out.shape == (3, 5, 7)
    assert torch.equal(out.as_subclass(torch.Tensor), torch.full((3, 5, 7), -1.0))
    assert mask.dtype == torch.int64
