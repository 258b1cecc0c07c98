"""Screens: reproducible to the bit, the class in one word alone, plain ground that is equal to its neighbours."""

import hashlib
import pickle

import numpy as np
import pytest

from msvit.data.loaders import BUILT_IN, make, make_loaders
from msvit.data.screens import LENGTHS, WORDS, Screens
from msvit.data.seeds import hashed


def rendered(label, count=32, size=(128, 96)):
    return Screens(count, size)._render(hashed(7, np.arange(count)), np.full(count, label))


def test_the_same_pictures_on_every_machine():
    screens = Screens(40, (96, 70), seed=3)
    images, labels = screens.batch([0, 7, 39])
    content = images.numpy().tobytes() + labels.numpy().tobytes() + screens.masks([0, 7, 39]).tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "d563061f50eee9e1"
    again = pickle.loads(pickle.dumps(screens))
    assert np.array_equal(again.batch([7])[0], images[1:2])


def test_the_class_is_in_the_letters_of_one_word_alone():
    assert {len(word) for word in WORDS} == {4}
    assert 4 not in LENGTHS
    versions = [rendered(label) for label in range(8)]
    for label, (images, masks) in enumerate(versions):
        word = masks == label + 1
        assert (word.sum((1, 2)) == 11 * 24).all()
        for others, _ in versions[:label]:
            changed = (images != others).any(1)
            assert changed.any((1, 2)).all()
            assert not changed[~word].any()


def test_most_regions_of_a_screen_are_plain():
    images = rendered(0, size=(128, 128))[0]
    cells = images.reshape(-1, 3, 8, 16, 8, 16)
    plain = (cells.max((3, 5)) == cells.min((3, 5))).all(1).mean()
    assert 0.3 < plain < 0.8


def test_the_oracle_is_fine_at_the_word():
    screens = Screens(8, 128)
    regions, masks = screens.object_regions(range(8), 16), screens.masks(range(8))
    word = (masks > 0) & (masks < 9)
    assert np.array_equal(regions, word.reshape(8, 8, 16, 8, 16).any((2, 4)))
    assert 2 <= regions.sum((1, 2)).min() <= regions.sum((1, 2)).max() <= 6
    assert np.array_equal(screens.object_regions(3, 16), regions[3])


def test_loaders_and_names():
    loaders = make_loaders("screens", 64, batch=8, train_n=16, val_n=8)
    assert loaders.classes == list(WORDS)
    assert next(iter(loaders.train)).images.shape == (8, 3, 64, 64)
    assert make("screens", 8, 64).name(3) == "screens seed 0 train #3"
    assert [make(data, 8, 64).title for data in BUILT_IN] == list(BUILT_IN)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="size=32: screens need a height and a width of at least 64"):
        Screens(8, 32)
    with pytest.raises(ValueError, match="screen.*screens"):
        make("screen", 8, 64)
