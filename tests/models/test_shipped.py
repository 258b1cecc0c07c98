"""Models that come with the package."""

import copy
import tarfile
from collections import Counter

import pytest
import torch
from helpers import mini_model
from peers import FOLDER

import msvit
from msvit.data.scenes import DIFFICULTIES, Scenes
from msvit.models.shipped import SHIPPED, Card, card, load, pack, shipped
from msvit.training.build import load_data
from msvit.training.recipe import DataSettings

PHOTOGRAPHS = FOLDER / "imagenette_128.tar"

ABOUT = Card("a test", "scenes:easy", ("a", "b"), (0.5,) * 3, (0.25,) * 3, 0.9, 0.95, 0.6, "msvit train")


@pytest.fixture
def packed(tmp_path):
    model = mini_model()
    model.threshold = 0.123456
    model.save_pretrained(tmp_path / "model")
    return model, pack(tmp_path / "model", "mini", ABOUT, tmp_path / "weights")


def test_a_packed_model_is_the_same_but_for_rounding(packed):
    model, path = packed
    again = load("mini", path.parent)
    assert not again.training
    assert again.threshold == model.threshold, "what decides is not rounded"
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        parameter.data = parameter.data.half().float()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), half(images))
    assert torch.allclose(again(images), model(images), atol=0.05)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert path.stat().st_size < 0.6 * (path.parents[1] / "model/model.safetensors").stat().st_size
    assert card("mini", path.parent) == ABOUT


def test_a_name_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="model='scene' is not known; the nearest is 'scenes'"):
        msvit.load("scene")


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_model_has_its_card(name):
    about, model = card(name), msvit.load(name)
    assert len(about.classes) == model.num_classes
    assert "msvit" in about.command
    assert 0 < about.macs < 1
    assert (SHIPPED / f"{name}.safetensors").stat().st_size < 45e6
    assert name in (SHIPPED / "README.md").read_text()


def test_the_model_of_the_scenes_does_what_its_card_says():
    about, model = card("scenes"), msvit.load("scenes", fast_cpu=True)
    assert about.classes == DIFFICULTIES["middle"].classes
    assert (SHIPPED / "scenes.safetensors").stat().st_size < 1e6
    scenes = Scenes(512, difficulty="middle", split="val")
    images, labels = torch.stack([scenes[i][0] for i in range(512)]), torch.tensor(scenes.labels(range(512)))
    with torch.inference_mode():
        result = model.run(images)
    found = (result.logits.argmax(1) == labels).double().mean().item()
    assert found == pytest.approx(about.accuracy, abs=0.03)
    assert result.macs.mean().item() / model.dense_macs((64, 64)) == pytest.approx(about.macs, abs=0.03)


@pytest.mark.long
@pytest.mark.skipif("photo" not in shipped() or not PHOTOGRAPHS.is_file(), reason="the photographs are not at hand")
def test_the_model_of_photographs_does_what_its_card_says(tmp_path):
    """On 30 validation pictures of each class, whose folders have WordNet's numbers, which sort as the card's names."""
    with tarfile.open(PHOTOGRAPHS) as file:
        names, seen = [m for m in file.getmembers() if m.isfile() and m.name.endswith(".jpg")], Counter()
        chosen = [m for m in names if seen.update([m.name.rsplit("/", 1)[0]]) or seen[m.name.rsplit("/", 1)[0]] <= 30]
        file.extractall(tmp_path, chosen, filter="data")
    about, model = card("photo"), msvit.load("photo", fast_cpu=True)
    assert (SHIPPED / "photo.safetensors").stat().st_size < 12e6
    loaders = load_data(DataSettings(source=f"folder:{tmp_path / 'imagenette'}", size=128), 0, model)
    assert (tuple(loaders.mean), tuple(loaders.std)) == (about.mean, about.std)
    right, macs = [], []
    with torch.inference_mode():
        for batch in loaders.val:
            result = model.run(batch.images)
            right.append(result.logits.argmax(1) == batch.targets)
            macs.append(result.macs / model.dense_macs((128, 128)))
    assert torch.cat(right).double().mean().item() == pytest.approx(about.accuracy, abs=0.06)
    assert torch.cat(macs).mean().item() == pytest.approx(about.macs, abs=0.03)
