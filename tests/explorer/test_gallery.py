"""The gallery: what a survey says of each picture, and what the browser is sent of it."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import mini_model, open_explorer, write_folder
from PIL import Image

from msvit.data.scenes import Scenes
from msvit.explorer.gallery import Gallery
from msvit.explorer.models import LoadedModel
from msvit.explorer.sources import BuiltInSource, Picture, folder_source
from msvit.explorer.state import pixels_of_tokens, run_backbone, run_gate
from msvit.explorer.survey import BATCH, SHEET, THUMB, Survey, class_of, survey


@pytest.fixture
def scenes():
    loaded = LoadedModel.of("mini", mini_model())
    return LoadedModel(loaded.name, loaded.model, Scenes(1, difficulty="easy").classes, Scenes.mean, Scenes.std, "")


def test_a_survey_says_what_the_model_says_of_each_picture(scenes):
    source, told = BuiltInSource("scenes:easy"), []
    source.files = dict(list(source.files.items())[: BATCH + 3])
    found = survey(scenes, source, lambda *counts: told.append(counts))
    assert told == [(BATCH, BATCH + 3), (BATCH + 3, BATCH + 3)]
    assert found.names == source.names()
    for i in (0, 5, BATCH + 2):
        gated = run_gate(scenes, source.picture(found.names[i], scenes.size))
        with torch.inference_mode():
            result = scenes.model.run(gated.pixels)
            dense = scenes.model.vit(gated.pixels).argmax().item()
        assert found.tokens[i] == result.tokens.item()
        assert (found.predicted[i], found.dense[i]) == (result.logits.argmax().item(), dense)
        assert scenes.classes[found.truth[i]] == gated.picture.truth
        loss = F.cross_entropy(result.logits, torch.tensor([found.truth[i]])).item()
        assert found.loss[i] == pytest.approx(loss, abs=1e-4)
        seen = pixels_of_tokens(run_backbone(gated, scenes.model.threshold))
        assert np.abs(found.thumbs[i].astype(int) - seen).max() <= 2, "as the model sees it"


def test_own_pictures_have_the_class_of_their_folder_or_none(tmp_path):
    write_folder(tmp_path, classes=("cat", "dog"), train=2, val=1)
    (tmp_path / "train/cat/torn.png").write_bytes(b"no picture")
    loaded = LoadedModel.of("mini", mini_model())
    loaded = LoadedModel(loaded.name, loaded.model, ("dog", *"abcdef", "x"), loaded.mean, loaded.std, "")
    found = survey(loaded, folder_source(tmp_path))
    assert "train/cat/torn.png" not in found.names
    assert {name.split("/")[1]: truth for name, truth in zip(found.names, found.truth.tolist(), strict=True)} == {
        "cat": -1,
        "dog": 0,
    }
    assert np.array_equal(np.isnan(found.loss), found.truth < 0)
    picture = Picture("dog/x/1.png", Image.new("RGB", (8, 8)), truth="a")
    assert class_of(picture, ("dog", "a", "x")) == 1, "what is known comes before the folder's name"


def test_segmenters_have_no_gallery(segmenter):
    with pytest.raises(ValueError, match="labels pixels"):
        survey(segmenter, BuiltInSource("scenes:easy"))


def some(n):
    numbers = np.arange(n)
    thumbs = np.broadcast_to((numbers % 200).astype(np.uint8)[:, None, None, None], (n, THUMB, THUMB, 3))
    return Survey(
        [f"{i}.png" for i in numbers], numbers % 3, numbers % 2, numbers % 3, numbers / 7, numbers + 17, thumbs
    )


def test_sheets_hold_the_thumbnails_in_their_order():
    whole = some(SHEET**2 + 5)
    with Image.open(io.BytesIO(whole.sheet(1))) as image:
        pixels = np.asarray(image.convert("L"), int)
    assert pixels.shape == (SHEET * THUMB, SHEET * THUMB)
    for k in range(5):
        middle = pixels[THUMB // 2, k * THUMB + THUMB // 2]
        assert abs(middle - (SHEET**2 + k) % 200) <= 3
    assert pixels[-10:, -10:].max() < 5


def test_ten_thousand_pictures_are_sent_a_sheet_at_a_time(monkeypatch):
    gallery, sent = Gallery(), []
    monkeypatch.setattr(gallery, "send", lambda content, buffers: sent.append((content, len(buffers[0]))))
    gallery.show(some(10_000), LoadedModel.of("mini", mini_model()))
    assert len(gallery.loss) == len(gallery.names) == 10_000
    for asked in (0, 39, 40, -1, "0", None):
        gallery._send_sheet(asked)
    assert [content["sheet"] for content, _ in sent] == [0, 39]
    assert all(content["version"] == 1 for content, _ in sent)
    assert all(size < 200_000 for _, size in sent)


def test_a_click_opens_the_picture(tmp_path):
    write_folder(tmp_path / "mine", classes=("cat", "dog"), train=2, val=1)
    explorer = open_explorer(LoadedModel.of("mini", mini_model()), source=str(tmp_path / "mine"), out=tmp_path)
    assert explorer.gallery_box.layout.display == "none"
    explorer.survey.click()
    assert explorer.gallery_box.layout.display is None
    assert explorer.message.value == ""
    explorer.source.value = "scenes: easy"
    explorer.gallery.chosen = "train/dog/1.png"
    assert explorer.states[0].gated.picture.name == "train/dog/1.png"
    assert explorer.source.value == str(tmp_path / "mine")
