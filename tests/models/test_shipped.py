"""Models that come with the package."""

import copy

import pytest
import torch
from helpers import mini_model

import msvit
from msvit.data.scenes import DIFFICULTIES, Scenes
from msvit.models.shipped import SHIPPED, Card, card, load, pack, shipped

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
