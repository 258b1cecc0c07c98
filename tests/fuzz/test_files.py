"""Pictures, folders of pictures, folders of models and records of runs, bent in every way: an error of one kind."""

import contextlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import timm
from helpers import encoded, gradient
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import msvit
from msvit.data.decode import PictureError
from msvit.data.images import open_sources
from msvit.data.segmentation import open_folder
from msvit.explorer.uploads import read_picture
from msvit.models.check_config import ModelFolderError
from msvit.training import runs
from msvit.training.files import RunError
from msvit.training.recipe import Recipe

WHOLE = [encoded(gradient(size=(24, 16)), kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")]
damage = st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=8)


def bent(data, changes, cut):
    data = bytearray(data)
    for place, byte in changes:
        data[place % len(data)] = byte
    return bytes(data[: len(data) - cut % len(data)])


@given(st.sampled_from(WHOLE), damage, st.integers(0, 500))
def test_a_picture_is_rgb_or_refused(data, changes, cut):
    with contextlib.suppress(PictureError):
        assert read_picture(bent(data, changes, cut), "x.png").mode == "RGB"


@given(st.binary(max_size=200))
def test_bytes_are_rgb_or_refused(data):
    with contextlib.suppress(PictureError):
        assert read_picture(data, "x.png").mode == "RGB"


parts = st.sampled_from(["train", "val", "cat", "dog", "a.png", "b.PNG", ".hidden", "x.txt", "images", "labels"])
paths = st.lists(parts, min_size=1, max_size=4).map("/".join)
trees = st.lists(st.tuples(paths, st.sampled_from(["file", "folder", "link"]), paths), max_size=14)
PIXEL = encoded(Image.new("RGB", (4, 4)))


def plant(root, tree):
    for path, kind, target in tree:
        with contextlib.suppress(OSError):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            if kind == "file":
                (root / path).write_bytes(PIXEL)
            elif kind == "folder":
                (root / path).mkdir()
            else:
                (root / path).symlink_to(root / target)


@given(trees)
def test_a_folder_is_a_data_set_or_refused(tree):
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        plant(root, [(f"{split}/{name}/0.png", "file", "") for split in ("train", "val") for name in ("cat", "dog")])
        plant(root, tree)
        with contextlib.suppress(ValueError, OSError):
            train, _, classes = open_sources(f"folder:{root}", (1, 1), 0, 0)
            for i in range(len(train)):
                path, label = train.reader.samples[i]
                assert Path(path).parent.name == classes[label], "labelled by the folder that it lies in"
                assert Path(path).parent.parent == root / "train"
        with contextlib.suppress(ValueError, OSError):
            assert open_folder(root).train


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    msvit.MSViT(timm.create_model("vit_mini_patch8_64")).save_pretrained(folder)
    return folder


scalar = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
odd = scalar | st.lists(scalar, max_size=3) | st.dictionaries(st.text(max_size=8), scalar, max_size=2)
places = st.sampled_from(
    [
        ("scales",),
        ("margin",),
        ("gate",),
        ("gate", "patch"),
        ("gate", "name"),
        ("coarse_embed",),
        ("reducer",),
        ("head",),
    ]
    + [("backbone",), ("backbone", "name"), ("backbone", "args"), ("backbone", "args", "img_size")]
    + [("backbone", "args", name) for name in ("depth", "embed_dim", "patch_size", "norm_layer", "checkpoint_path")]
)


@given(places, odd)
def test_a_model_folder_is_a_model_or_refused(saved, place, value):
    config = json.loads((saved / "config.json").read_text())
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with tempfile.TemporaryDirectory() as scratch:
        shutil.copy(saved / "model.safetensors", scratch)
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        with contextlib.suppress(ModelFolderError):
            assert isinstance(msvit.MSViT.from_pretrained(scratch), msvit.MSViT)


RECORD = {"settings.json": json.dumps(Recipe().to_dict()), "metrics.jsonl": '{"epoch": 1}\n', "summary.json": "{}"}


@pytest.mark.filterwarnings("ignore::msvit.training.files.RunWarning")
@given(st.sampled_from(sorted(RECORD)), damage, st.integers(0, 500))
def test_a_record_is_read_or_called_damaged(name, changes, cut):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        folder.mkdir()
        for file, text in RECORD.items():
            (folder / file).write_bytes(bent(text.encode(), changes, cut) if file == name else text.encode())
        with contextlib.suppress(RunError):
            assert runs.read(folder).recipe
        (status,) = runs.load(scratch)["status"]
        assert status in ("finished", "unfinished", "damaged")


def test_what_is_bent_is_what_was_meant():
    assert bent(b"abc", [(0, 65)], 1) == b"Ab"
    assert Image.open(io.BytesIO(WHOLE[0])).size == (24, 16)
