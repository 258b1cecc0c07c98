"""Scenes: reproducible to the bit, erased exactly at half resolution, with masks that tell the truth."""

import hashlib
import pickle

import numpy as np
import pytest
import torch

from msvit.data import made
from msvit.data import scenes as S
from msvit.data.scenes import DIFFICULTIES, Scenes, render
from msvit.data.seeds import hashed, permutation


def rendered(labels, difficulty="easy", size=(64, 64), count=64):
    """Pictures that agree in everything but the labels."""
    keys = hashed(7, np.arange(count))
    return render(keys, np.broadcast_to(labels, count), size, DIFFICULTIES[difficulty])


def halved(images):
    """Sums over blocks of 2 x 2 pixels."""
    b, c, h, w = images.shape
    return images.astype(int).reshape(b, c, h // 2, 2, w // 2, 2).sum((3, 5))


@pytest.mark.parametrize(
    ("difficulty", "digest"),
    [
        ("easy", "4b587c8c2913a381"),
        ("middle", "a93abbc7081c8e8f"),
        ("hard", "04b4caf4560067a7"),
        ("scales", "d6c356013f72864c"),
    ],
)
def test_the_same_pictures_on_every_machine(difficulty, digest):
    scenes = Scenes(40, size=(96, 70) if difficulty == "scales" else (48, 70), seed=3, difficulty=difficulty)
    images, labels = scenes.batch([0, 7, 39])
    content = images.numpy().tobytes() + labels.numpy().tobytes() + scenes.masks([0, 7, 39]).tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == digest


def test_a_picture_depends_on_its_number_alone(monkeypatch):
    few, many = Scenes(300, seed=5), Scenes(5000, seed=5)
    picks = [299, 3, 3, 150, 0]
    images, labels = few.batch(picks)
    assert torch.equal(images, many.batch(picks)[0])
    assert torch.equal(images[1], many[3][0])
    assert int(labels[1]) == many[3][1]
    monkeypatch.setattr(made, "_CACHE_BYTES", 0)
    uncached = Scenes(300, seed=5)
    assert torch.equal(images, uncached.batch(picks)[0])
    assert np.array_equal(few.masks(picks), uncached.masks(picks))
    assert not uncached._chunks


def test_training_and_validation_share_no_picture():
    train, val = (Scenes(2048, split=split).batch(range(2048))[0].numpy() for split in ("train", "val"))
    seen = {x.tobytes() for x in train}
    assert len(seen) == 2048
    assert not seen & {x.tobytes() for x in val}


def test_seeds_differ():
    assert not torch.equal(Scenes(1, seed=0)[0][0], Scenes(1, seed=1)[0][0])
    assert not torch.equal(Scenes(1, seed=-1)[0][0], Scenes(1, seed=1)[0][0])


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_half_resolution_erases_the_class_exactly(difficulty):
    versions = [rendered(label, difficulty)[0] for label in range(8)]
    for k, images in enumerate(versions):
        assert np.array_equal(halved(images), halved(versions[0]))
        for other in versions[:k]:  # and at full resolution every picture is another
            assert (images != other).any((1, 2, 3)).all()


def test_middle_scenes_show_half_of_their_classes_at_half_resolution():
    halves = [halved(rendered(label, "middle")[0]) for label in range(8)]
    names = DIFFICULTIES["middle"].classes
    for k, name in enumerate(names):
        for j in range(k):
            differ = (halves[k] != halves[j]).any((1, 2, 3))
            assert differ.all() if name.startswith("wide") else not differ.any()
    assert sum(name.startswith("wide") for name in names) == 4


def test_the_object_is_where_its_mask_says():
    (a, mask_a), (b, mask_b) = rendered(2), rendered(5)
    inside = mask_a == 3
    assert np.array_equal(inside, mask_b == 6)
    assert np.array_equal(mask_a == 9, mask_b == 9)
    differ = (a != b).any(1)
    assert not differ[~inside].any()
    assert 0.3 < differ[inside].mean() < 0.7  # two zero-mean patterns agree on half of the pixels
    assert (inside.sum((1, 2)) > 60).all()


def test_a_matched_filter_reads_every_easy_scene():
    """All information that a perfect classifier needs is in the object's pixels."""
    scenes = Scenes(256)
    images, labels = scenes.batch(range(256))
    masks = scenes.masks(range(256))
    planes = np.stack([np.tile(S._TEXTURES[name], (4, 4)) for name in scenes.classes])
    for image, label, mask in zip(images.numpy(), labels.tolist(), masks, strict=True):
        inside = mask == label + 1
        assert np.argmax((image.sum(0) * inside * planes).sum((1, 2))) == label


def test_every_eight_pictures_have_every_class():
    labels = Scenes(800, seed=2).labels(np.arange(800)).reshape(-1, 8)
    assert np.array_equal(np.sort(labels, 1), np.broadcast_to(np.arange(8), labels.shape))
    assert len(np.unique(labels, axis=0)) > 20  # of the 32 orders


@pytest.mark.parametrize(("size", "patch"), [(64, 16), ((48, 80), 16), ((50, 75), 16), ((33, 16), 8)])
def test_object_regions_are_the_patches_touched(size, patch):
    scenes = Scenes(20, size=size, difficulty="hard")
    regions = scenes.object_regions(range(20), patch)
    h, w = scenes.size
    for i in range(20):
        mask = scenes.mask(i)
        assert mask.shape == (h, w)
        assert scenes[i][0].shape == (3, h, w)
        assert mask.max() <= 9
        assert (mask == scenes[i][1] + 1).any()
        assert not ((mask > 0) & (mask < 9) & (mask != scenes[i][1] + 1)).any()
        for y in range(regions.shape[1]):
            for x in range(regions.shape[2]):
                part = mask[y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
                assert regions[i, y, x] == ((part > 0) & (part < 9)).any()
        assert np.array_equal(scenes.object_regions(i, patch), regions[i])
    assert regions.shape[1:] == (-(-h // patch), -(-w // patch))


def averaged(images, k):
    """Sums over blocks of k x k pixels."""
    b, c, h, w = images.shape
    return images.astype(int).reshape(b, c, h // k, k, w // k, k).sum((3, 5))


def test_scales_are_erased_one_after_the_other():
    """Each texture is read at its own resolution, and at half of it gone to the bit; objects are of three sizes."""
    level = DIFFICULTIES["scales"]
    versions = [rendered(label, "scales", (128, 128), 48) for label in range(8)]
    for j, (images, _) in enumerate(versions):
        for k, (others, _) in enumerate(versions[:j]):
            for scale in (1, 2, 4):
                differ = (averaged(images, scale) != averaged(others, scale)).any((1, 2, 3))
                gone = scale > max(level.details[j], level.details[k])
                assert not differ.any() if gone else differ.all()
    areas = ((versions[0][1] > 0) & (versions[0][1] < 9)).sum((1, 2))
    assert areas.max() > 6 * areas.min() > 0
    assert [level.details.count(side) for side in (1, 2, 4)] == [3, 3, 2]


def test_the_ideal_quadtree_of_scales_loses_nothing():
    """Where it says one token, the means that the token sees tell the class; where it divides, they would not."""
    scenes = Scenes(64, size=128, difficulty="scales")
    images, labels = scenes.batch(range(64))
    details = np.array(DIFFICULTIES["scales"].details)[labels]
    inside = (scenes.masks(range(64)) > 0) & (scenes.masks(range(64)) < 9)
    for side, patch in ((2, 16), (4, 32)):
        regions = scenes.object_regions(range(64), patch, side)
        touched = inside.reshape(64, 128 // patch, patch, 128 // patch, patch).any((2, 4))
        assert np.array_equal(regions, touched & (details < side)[:, None, None])
        grey = images.numpy().sum(1)
        lost = grey - averaged(64 * images.numpy(), side).sum(1).repeat(side, 1).repeat(side, 2) / (64 * side**2)
        full = scenes.masks(range(64)) == (labels + 1).numpy()[:, None, None]
        for b in range(64):  # the texture alone: backgrounds are smooth, borders of blobs are left out
            inner = full[b].reshape(32, 4, 32, 4).all((1, 3)).repeat(4, 0).repeat(4, 1)
            assert (np.abs(lost[b][inner]).mean() > 0.5) == (details[b] < side)


@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_pictures_are_normalised(difficulty):
    scenes = Scenes(512, difficulty=difficulty)
    images, _ = scenes.batch(range(512))
    assert abs(images.mean()) < 0.05
    assert 0.3 < images.std() < 0.6
    pixels = images * torch.tensor(scenes.std)[:, None, None] + torch.tensor(scenes.mean)[:, None, None]
    assert (pixels * 255 - (pixels * 255).round()).abs().max() < 1e-3
    assert 0 < pixels.min()
    assert pixels.max() < 1  # nothing is clipped
    assert len(scenes.regions) == 10
    assert len(set(scenes.classes)) == 8


def test_fine_textures_have_blocks_of_zero_mean_and_differ_wherever_they_start():
    for name in DIFFICULTIES["hard"].classes:
        assert not halved(S._TEXTURES[name][None, None]).any(), name
    shifts = [(y, x) for y in (0, 2) for x in (0, 2)]
    seen = {np.roll(S._TEXTURES[n], s, (0, 1)).tobytes(): n for n in DIFFICULTIES["hard"].classes for s in shifts}
    for name in DIFFICULTIES["hard"].classes:
        assert {seen[np.roll(S._TEXTURES[name], s, (0, 1)).tobytes()] for s in shifts} == {name}
    for name in ("decoy 1", "decoy 2"):
        assert halved(S._TEXTURES[name][None, None]).any()


def test_a_worker_gets_no_cache():
    scenes = Scenes(64)
    first = scenes[0][0]
    copy = pickle.loads(pickle.dumps(scenes))
    assert scenes._chunks
    assert not copy._chunks
    assert torch.equal(copy[0][0], first)


def test_permutation_is_one_and_pinned():
    assert sorted(permutation(1000, 4, 2)) == list(range(1000))
    assert permutation(8, 0, 1).tolist() == [3, 0, 1, 5, 2, 7, 4, 6]
    assert permutation(8, 0, 1).tolist() != permutation(8, 0, 2).tolist()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 8}, "size=8: scenes:easy need"),
        ({"size": (64, 4)}, "at least 16"),
        (
            {"difficulty": "esay"},
            "difficulty='esay' is not known; .* 'easy'. There are: easy, middle, hard, scales",
        ),
        ({"size": 48, "difficulty": "scales"}, "at least 64"),
        ({"split": "test"}, "split='test' is not known. There are: train, val"),
        ({"n": 0}, "n=0: a data set needs"),
    ],
)
def test_refusals(settings, words):
    with pytest.raises(ValueError, match=words):
        Scenes(**{"n": 4} | settings)


def test_an_index_outside_is_refused():
    with pytest.raises(IndexError, match="index 4 is outside 0..3"):
        Scenes(4)[4]
    with pytest.raises(IndexError, match="index -1"):
        Scenes(4).masks([-1, 2])
    assert len(list(Scenes(4))) == 4  # iteration ends by that error
