"""Loaders: an epoch is a function of (seed, epoch), and odd files are read right or counted by name."""

import random
import tarfile

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard
from helpers import epoch, same, write_folder
from PIL import Image
from timm.data.dataset import IterableImageDataset
from torch.utils.data import Dataset

from msvit.checks import DataError
from msvit.data import images as pictures
from msvit.data.decode import to_rgb
from msvit.data.loaders import Batch, make_loaders, set_epoch

fork = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # Python 3.12, where torch has threads


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "pictures")


def settings(folder, **changes):
    return {"data": f"folder:{folder}", "size": 16, "batch": 4, "val_batch": 4, "augment": "timm"} | changes


def test_scenes_by_default():
    loaders = make_loaders(train_n=300, val_n=50, batch=128, val_batch=32)
    batches, val = epoch(loaders, 0), list(loaders.val)
    assert [len(b.targets) for b in batches] == [128, 128]
    assert loaders.steps == 2
    assert [len(b.targets) for b in val] == [32, 18]
    assert torch.cat([b.indices for b in val]).tolist() == list(range(50))
    dataset = loaders.train.dataset
    image, label, i = dataset[300 + 7]  # picture 7 in epoch 1
    assert i == 7
    assert label == int(dataset.scenes.labels([7])[0])
    assert torch.equal(image, dataset.scenes[7][0])
    assert isinstance(batches[0], Batch)
    assert len(loaders.classes) == 8
    assert loaders.names("val", [3]) == ["scenes:easy seed 0 val #3"]
    assert loaders.unreadable("train") == []
    assert len(make_loaders(train_n=0, val_n=0).val.dataset) == 2048


def test_the_strongest_draw_of_timms_augmentation_can_be_carried_out(folder, monkeypatch):
    """Magnitudes are drawn at random; one that the picture library refuses would end a run after an hour."""
    monkeypatch.setattr(random, "gauss", lambda mean, deviation: 99.0)
    loaders = make_loaders(**settings(folder))
    assert all(batch.images.isfinite().all() for e in range(20) for batch in epoch(loaders, e))


@pytest.mark.parametrize("kind", ["scenes", "folder"])
def test_an_epoch_is_a_function_of_seed_and_epoch(folder, kind):
    how = settings(folder) if kind == "folder" else {"train_n": 24, "val_n": 4, "batch": 8}
    a, b = make_loaders(**how), make_loaders(**how)
    epochs = [epoch(a, e) for e in range(3)]
    assert same(epoch(b, 2), epochs[2])  # resumed
    assert same(epoch(a, 1), epochs[1])  # gone back
    orders = [torch.cat([x.indices for x in e]).tolist() for e in epochs]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    other = epoch(make_loaders(**how, seed=1), 0)
    assert orders[0] != torch.cat([x.indices for x in other]).tolist()


def test_what_a_threshold_is_calibrated_on_is_not_augmented(folder):
    busy, plain = (make_loaders(**settings(folder, augment=name)) for name in ("light", "none"))
    for a, b in zip(busy.first_pictures(), plain.first_pictures(), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.indices, b.indices)
    assert not torch.equal(next(iter(busy.train)).images, next(iter(plain.train)).images)


def test_augmentation_changes_with_the_epoch_and_validation_does_not(folder):
    loaders = make_loaders(**settings(folder, augment="light"))
    n = len(loaders.train.dataset)
    images = [loaders.train.dataset[k * n + 2][0] for k in range(6)]
    assert len({x.numpy().tobytes() for x in images}) > 3
    images = [make_loaders(**settings(folder, augment="light", seed=k)).train.dataset[2][0] for k in range(6)]
    assert len({x.numpy().tobytes() for x in images}) > 3
    first, second = list(loaders.val), list(loaders.val)
    assert same(first, second)
    assert torch.equal(first[0].images[0], make_loaders(**settings(folder, seed=9)).val.dataset[0][0])


@fork
def test_workers_change_nothing(folder):
    alone, helped = make_loaders(**settings(folder)), make_loaders(**settings(folder, workers=2))
    for e in (3, 1):
        assert same(epoch(alone, e), epoch(helped, e))
    assert same(list(alone.val), list(helped.val))


def test_reading_leaves_the_global_random_numbers_alone(folder):
    def state():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    for how in (settings(folder), {"train_n": 16, "val_n": 8, "batch": 8}):
        loaders = make_loaders(**how)
        random.seed(12), np.random.seed(34), torch.manual_seed(56)  # noqa: NPY002
        before = state()
        epoch(loaders, 0), list(loaders.val)
        assert state() == before


@pytest.mark.parametrize("n", [64, 59])
def test_two_processes_share_the_batches_of_one(n):
    loaders = make_loaders(train_n=n, val_n=n, batch=8, val_batch=8)
    for loader in (loaders.train, loaders.val):
        set_epoch(loader, 5)
        whole = list(loader.batch_sampler)
        halves = [list(BatchSamplerShard(loader.batch_sampler, 2, k, split_batches=True)) for k in range(2)]
        assert len(halves[0]) == len(halves[1]) == len(whole)
        for batch, a, b in zip(whole, *halves, strict=True):
            assert len(a) == len(b) == 4
            assert (a + b)[: len(batch)] == batch  # the last one of validation is filled up


def test_accelerate_takes_the_loaders(folder):
    plain, prepared = make_loaders(**settings(folder)), make_loaders(**settings(folder))
    loader = Accelerator(cpu=True).prepare(prepared.train)
    set_epoch(loader, 2)
    for e in (2, 3):  # it counts on by itself
        batches = list(loader)
        assert isinstance(batches[0], Batch)
        assert same(batches, epoch(plain, e))
    assert set(loader.dataset.order) == set(plain.train.dataset.order)


def test_limits_take_a_fixed_mixture(folder):
    some = make_loaders(**settings(folder, train_n=6))
    assert same(epoch(some, 0), epoch(make_loaders(**settings(folder, train_n=6)), 0))
    targets = {some.train.dataset[i][1] for i in range(6)}
    assert targets == {0, 1}
    assert make_loaders(**settings(folder, train_n=6, seed=3)).names("train", range(6)) == some.names("train", range(6))
    assert len(make_loaders(**settings(folder, train_n=0)).train.dataset) == 12
    assert len(make_loaders(**settings(folder, train_n=999)).train.dataset) == 12


def test_names_targets_and_values(folder):
    loaders = make_loaders(**settings(folder, augment="none", size=(30, 40), mean=(0.5,) * 3, std=(0.25,) * 3))
    assert loaders.classes == ["cat", "dog"]
    assert loaders.size == (30, 40)
    for batch in loaders.val:
        assert batch.images.shape[1:] == (3, 30, 40)
        for image, target, name in zip(batch.images, batch.targets, loaders.names("val", batch.indices), strict=True):
            assert f"/val/{loaders.classes[target]}/" in name
            pixels = torch.from_numpy(np.array(Image.open(name))).permute(2, 0, 1) / 255
            assert torch.allclose(image, (pixels - 0.5) / 0.25)


def test_odd_pictures_become_what_they_show():
    ramp = np.arange(0, 65536, 4096, dtype=np.uint16).reshape(4, 4)
    assert np.array_equal(np.array(to_rgb(Image.fromarray(ramp)))[..., 1], np.round(ramp / 257).astype(np.uint8))
    assert np.array_equal(np.array(to_rgb(Image.fromarray(ramp.astype(np.int32))))[..., 0], np.round(ramp / 257))
    half = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    half.putpixel((1, 0), (10, 20, 30, 255))
    assert np.array(to_rgb(half)).tolist() == [[[255, 255, 255], [10, 20, 30]]]
    assert np.array(to_rgb(Image.new("LA", (1, 1), (0, 0)))).tolist() == [[[255, 255, 255]]]
    assert np.array(to_rgb(Image.new("CMYK", (1, 1), (0, 255, 255, 0)))).tolist() == [[[255, 0, 0]]]
    assert np.array(to_rgb(Image.new("1", (1, 1), 1))).tolist() == [[[255, 255, 255]]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([1, 2, 3, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert np.array(to_rgb(palette)).tolist() == [[[1, 2, 3], [40, 50, 60]]]
    palette.info["transparency"] = 0
    assert np.array(to_rgb(palette)).tolist() == [[[255, 255, 255], [40, 50, 60]]]
    with pytest.raises(ValueError, match="floats without a known range"):
        to_rgb(Image.new("F", (1, 1)))


def test_a_picture_taken_sideways_stands_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        upright = np.array(to_rgb(opened))
    assert upright.shape == (4, 2, 3)
    assert upright[0, 1].tolist() == [255, 255, 255]


@pytest.fixture
def damaged(folder):
    """Four of twelve training files and one of six for validation cannot be read."""
    (folder / "train/cat/0.png").write_bytes(b"")
    (folder / "train/cat/1.png").unlink()
    (folder / "train/cat/1.jpg").write_text("this is a text file")
    (folder / "train/dog/2.png").write_bytes((folder / "train/dog/2.png").read_bytes()[:-60])
    (folder / "val/dog/0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    Image.new("F", (20, 20)).save(folder / "train/dog/3.tif")
    return folder


@fork
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_files_are_named_and_replaced(damaged, workers):
    loaders = make_loaders(**settings(damaged, workers=workers, batch=13))
    (batch,) = epoch(loaders, 0)
    broken = {"cat/0.png", "cat/1.jpg", "dog/2.png", "dog/3.tif"}
    found = loaders.unreadable("train")
    assert {"/".join(f.name.split("/")[-2:]) for f in found} == broken
    assert all(len(f.reason) > 20 for f in found)
    assert "floats" in next(f.reason for f in found if f.name.endswith("tif"))
    stand_ins = batch.indices < 0
    assert sorted(loaders.names("train", batch.indices[stand_ins])) == sorted(f.name for f in found)
    assert sorted((~batch.indices[stand_ins]).tolist() + batch.indices[~stand_ins].tolist()) == list(range(13))
    assert not any(name in {f.name for f in found} for name in loaders.names("train", batch.indices[~stand_ins]))
    val = list(loaders.val)
    assert sum(int((b.indices < 0).sum()) for b in val) == len(loaders.unreadable("val")) == 1
    assert same(epoch(make_loaders(**settings(damaged, batch=13)), 0), [batch])


def test_a_stand_in_is_the_next_readable_picture(damaged):
    dataset = make_loaders(**settings(damaged, augment="none")).train.dataset
    broken = [i for i in range(13) if dataset[i][2] < 0]
    assert len(broken) == 4
    for i in broken:
        j = next(k % 13 for k in range(i, i + 13) if k % 13 not in broken)
        assert torch.equal(dataset[i][0], dataset[j][0])
        assert dataset[i][1:] == (dataset[j][1], ~i)


def test_a_data_set_without_a_readable_file_ends_the_run(folder):
    for path in (folder / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"12 files in a row cannot be read, the first is .*\.png .*folder:"):
        epoch(make_loaders(**settings(folder)), 0)


def test_a_fault_of_the_transform_is_no_broken_file(folder):
    loaders = make_loaders(**settings(folder))

    def fails(image):
        raise ValueError("my own fault")

    loaders.train.dataset.transform = fails
    with pytest.raises(ValueError, match="my own fault"):
        epoch(loaders, 0)
    assert loaders.unreadable("train") == []


@fork
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm keeps its tars open
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_tars_read_like_folders(folder, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for name in ("cat", "dog"):
                tar.add(folder / split / name, name)
    how = settings(folder, augment="light")
    loaders, packed = make_loaders(**how), make_loaders(**how | {"data": f"tar:{tmp_path}", "workers": 2})
    assert packed.classes == ["cat", "dog"]
    dataset = packed.train.dataset
    first = dataset[0]  # opens the tar here, before the workers are forked
    batches = epoch(packed, 1)
    assert torch.equal(dataset[0][0], first[0])
    opened = dataset.source.reader.tar_state.tf
    dataset._pid = 0  # as in a forked process, which must not move the offset of its parent's file
    assert torch.equal(dataset[0][0], first[0])
    assert dataset.source.reader.tar_state.tf is not opened
    by_name = {tuple(n.split("/")[-2:]): i for i, n in enumerate(loaders.names("train", range(12)))}
    for batch in batches:
        for target, i in zip(batch.targets, batch.indices, strict=True):
            name = tuple(packed.names("train", [i])[0].split("/")[-2:])
            assert target == loaders.train.dataset[by_name[name]][1]
    plain = [make_loaders(**how | {"augment": "none", "data": d}) for d in (f"tar:{tmp_path}", f"folder:{folder}")]
    sums = [sorted(float(x.double().sum()) for b in p.val for x in b.images) for p in plain]
    assert sums[0] == sums[1]


class Memory(Dataset):
    """What torchvision's data sets look like: pictures and labels, no reader."""

    classes, class_to_idx = ["a", "b"], {"a": 0, "b": 1}

    def __len__(self):
        return 10

    def __getitem__(self, i):
        return Image.fromarray(np.add.outer(np.arange(20), np.arange(20) * i).astype(np.uint8)), i % 2


class Reader:
    """A stream as timm's readers are: set_epoch turns the order."""

    class_to_idx = {"a": 0, "b": 1}
    epoch = 0

    def __iter__(self):
        for i in range(10):
            yield Memory()[(i + self.epoch) % 10]

    def __len__(self):
        return 10

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_data_sets_by_timms_names(monkeypatch):
    asked = []

    def create(name, root, split, **how):
        asked.append((name, root, split))
        if split in ("val", "valid"):
            raise ValueError(f"Unknown split {split!r}")
        return Memory()

    monkeypatch.setattr(pictures, "create_dataset", create)
    loaders = make_loaders("hfds/some/name", size=20, batch=5, val_batch=5)
    assert asked == [("hfds/some/name", None, s) for s in ("train", "val", "validation")]
    assert loaders.classes == ["a", "b"]
    (a, b) = epoch(loaders, 0)
    assert sorted(torch.cat([a.indices, b.indices]).tolist()) == list(range(10))
    assert loaders.names("train", [0]) == [f"hfds/some/name train #{loaders.train.dataset.order[0]}"]
    monkeypatch.setattr(Memory, "class_to_idx", {})
    with pytest.raises(ValueError, match=r"does not name its classes; write them to ROOT/classes.txt"):
        make_loaders("hfds/some/name")


def test_streams(monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "create_dataset", lambda *a, **k: IterableImageDataset("", reader=Reader()))
    how = {"data": f"wds/name:{tmp_path}", "size": 20, "batch": 5, "val_batch": 5, "augment": "light"}
    loaders = make_loaders(**how)
    assert loaders.steps == 2
    epochs = [epoch(loaders, e) for e in range(2)]
    assert not same(*epochs)
    assert same(epoch(make_loaders(**how), 1), epochs[1])
    assert epochs[1][0].targets.tolist() == [1, 0, 1, 0, 1]
    assert not torch.equal(epochs[0][0].images, epoch(loaders, 10)[0].images)  # the same pictures, other crops
    assert loaders.names("train", [3]) == [f"wds/name:{tmp_path} train, picture 3 of the stream"]
    assert sum(len(b.targets) for b in make_loaders(**how, val_n=7).val) == 7
    monkeypatch.setattr(Reader, "class_to_idx", {})
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    assert make_loaders(**how).classes == ["one", "two"]


def loose(root):
    Image.new("RGB", (8, 8)).save(root / "train/loose.png")


def nested(root):
    (root / "val/cat/more").mkdir()
    Image.new("RGB", (8, 8)).save(root / "val/cat/more/0.png")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda r: (r / "val").rename(r / "vall"), r"has no val \(nor validation.*found: train, vall"),
        (lambda r: (r / "train/empty").mkdir(), r"every CLASS in train/CLASS/ needs pictures.*'empty'"),
        (loose, r"every CLASS in train/CLASS/ .*'train'"),
        (nested, r"every CLASS in val/CLASS/ .*'more'"),
        (lambda r: (r / "val/cat").rename(r / "val/cow"), "only in training: cat; only in validation: cow"),
        (lambda r: [(r / s / "cat").rename(r / f"{s}-cat") for s in ("train", "val")], "single class, 'dog'"),
        (lambda r: [p.unlink() for p in (r / "train").rglob("*.png")], "no CLASS in train/CLASS/ holds a picture"),
        (lambda r: [(r / "train" / c).rename(r / c) for c in ("cat", "dog")], "train has no classes"),
        (lambda r: r.rename(r.parent / "moved"), r"there is no folder '.*pictures'"),
    ],
)
def test_folders_that_are_not_as_they_should_be(folder, damage, words):
    damage(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        make_loaders(**settings(folder))


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            {"data": "scene:easy"},
            "data='scene:easy' is not known; the nearest is 'scenes:easy'. There are",
        ),
        ({"data": "scenes:midle"}, "the nearest is 'scenes:middle'"),
        ({"data": "/data/imagenet"}, "is not known. There are: scenes:easy"),
        ({"data": "folder:"}, "there is no folder ''"),
        ({"data": "torch/cifar10"}, "does not say where the pictures are; write torch/cifar10:/path"),
        ({"data": "torch/nosuch:."}, "cannot be opened; train: Unknown torchvision dataset nosuch"),
        ({"augment": "strong"}, "augment='strong' is not known. There are: none, light, timm"),
        ({"augment": "light"}, "built-in ones take 'none' and a larger train_n"),
    ],
)
def test_refusals(how, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        make_loaders(**how)


def test_unknown_splits_and_foreign_loaders():
    loaders = make_loaders(train_n=8, val_n=8)
    with pytest.raises(ValueError, match="split='test' is not known. There are: train, val"):
        loaders.names("test", [0])
    with pytest.raises(TypeError, match="does not come from make_loaders"):
        set_epoch(torch.utils.data.DataLoader([1, 2]), 0)
