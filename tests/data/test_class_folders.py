"""A label is the name of the picture's folder, and a picture is there once."""

import tarfile
import time

import pytest
from helpers import write_folder
from PIL import Image

from msvit.data.loaders import make_loaders


@pytest.fixture
def root(tmp_path):
    return write_folder(tmp_path / "pictures")


def loaders(root):
    return make_loaders(f"folder:{root}", size=16, batch=4, val_batch=4)


def nested(root):
    """timm takes the last folder's name: this picture would be a dog."""
    (root / "train/cat/dog").mkdir()
    Image.new("RGB", (8, 8)).save(root / "train/cat/dog/0.png")


def link(root, name, to):
    (root / name).symlink_to(to, target_is_directory=True)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (nested, r"train: every CLASS .* does not hold for 'dog' in 'cat', a folder"),
        (lambda r: link(r, "train/cat/more", r / "train/dog"), "'more' in 'cat', a link to a folder"),
        (lambda r: link(r, "train/cat/all", r), "'all' in 'cat', a link to a folder"),
        (lambda r: link(r, "train/cat/loop", r / "train/cat"), "'loop' in 'cat', a link to a folder"),
        (lambda r: link(r, "train/cow", r / "train/cat"), "train/cow and .*train/cat are the same folder"),
        (lambda r: link(r, "train/cow", r), "does not hold for"),
        (lambda r: link(r, "train/cow", r / "val/cat"), "are the same folder"),
        (lambda r: link(r, "train/.hidden", r), "does not hold for"),
        (lambda r: (r / "train/cat/x.png").symlink_to(r / "val/dog/0.png"), "x.png is a link to .*a picture already"),
        (lambda r: (r / "train/cat/x.png").symlink_to("0.png"), "x.png is a link to .*a picture already"),
    ],
)
def test_what_would_be_mislabelled_or_seen_twice_is_refused(root, damage, words):
    damage(root)
    begun = time.process_time()
    with pytest.raises(ValueError, match=words):
        loaders(root)
    assert time.process_time() - begun < 1, "loops of links took seven seconds"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cat/0.png", "cat/dog/0.png"], "there are classes in '.' and in 'cat'"),
        (["a/cat/0.png", "b/cat/0.png"], "there are classes in 'a' and in 'b'"),
        ([], "train.tar is no tar of CLASS/picture that can be read"),
        (None, "train.tar is no tar of CLASS/picture that can be read"),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm keeps its tars open
def test_tars_are_held_to_the_same(tmp_path, names, words):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            for name in names or ():
                tar.add(tmp_path / "x.png", f"./{name}")
    if names is None:
        (tmp_path / "train.tar").write_bytes(b"no tar at all" * 99)
    with pytest.raises(ValueError, match=words) as caught:
        make_loaders(f"tar:{tmp_path}", size=16, batch=1, val_batch=1)
    assert len(str(caught.value).splitlines()) == 1


def test_links_to_other_places_are_followed(root, tmp_path):
    (root / "train/cat").rename(tmp_path / "cats")
    link(root, "train/cat", tmp_path / "cats")
    Image.new("RGB", (8, 8)).save(tmp_path / "far.png")
    (root / "train/dog/far.png").symlink_to(tmp_path / "far.png")
    (root / "train/dog/.checkpoints").mkdir()
    found = loaders(root)
    assert found.classes == ["cat", "dog"]
    assert len(found.train.dataset) == 13
