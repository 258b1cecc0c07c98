"""The explorer's page, driven by its traits as a browser drives it."""

from datetime import UTC, datetime

import numpy as np
import pytest
from helpers import bomb, encoded, mini_model, open_explorer, reduced
from PIL import Image

from msvit.explorer import drawing, panels, sources
from msvit.explorer.models import LoadedModel
from msvit.explorer.painting import UNPAINTED
from msvit.explorer.panels import TOKEN_MAP_TITLE

GREY = (120, 130, 140)


@pytest.fixture
def explorer(loaded, tmp_path):
    mini_model(1).save_pretrained(tmp_path / "runs/other")
    return open_explorer(loaded, source="scenes: easy", runs=tmp_path / "runs", out=tmp_path / "out")


def files_of(**files):
    return [{"name": name.replace("_", "."), "type": "", "size": len(data), "content": memoryview(data),
             "last_modified": datetime(2026, 1, 1, tzinfo=UTC)} for name, data in files.items()]  # fmt: skip


def test_a_slider_moves_everything_and_the_other_slider(explorer):
    row = explorer.rows[0]
    shown = [row.images[title] for title in panels.panels_of(row.gated.loaded) if title in row.images]
    first, images = row.state, [image.value for image in shown]
    explorer.threshold.value = 0.99
    assert row.state.tokens == 65
    assert ">65</b> of 65 tokens" in row.figures.value
    assert not any(row.painter.coarse)
    assert explorer.budget.value == 100
    changed = [a != image.value for a, image in zip(images, shown, strict=True)]
    assert changed == [False, True, first.tokens != 65, True]
    explorer.budget.value = 30
    assert row.state.numbers()["macs_share"] == pytest.approx(0.3, abs=0.05)
    assert explorer.threshold.value == pytest.approx(row.state.threshold, abs=1 / 512)
    assert float(explorer.threshold.value * 256).is_integer(), "a browser would round it and send it back"


def test_the_brush_paints_and_clears(explorer):
    row = explorer.rows[0]
    explorer.threshold.value = 1.0
    row.painter.painted = [1, *row.painter.painted[1:]]
    assert row.state.tokens == 62
    assert row.state.coarse[0, 0]
    assert not any(row.painter.coarse), "the gate's own decisions stay as they are"
    explorer.brush.value = 0
    assert row.painter.brush == 0
    explorer.clear.click()
    assert row.state.tokens == 65
    assert set(row.painter.painted) == {UNPAINTED}
    row.painter.painted = [1, 1]  # what a browser sends late, of another grid, counts for nothing
    assert row.state.tokens == 65


def test_times_are_measured_after_a_stroke_and_after_its_undo(explorer, monkeypatch):
    asked, row = [], explorer.rows[0]
    monkeypatch.setattr(explorer, "_measure_at_rest", lambda: asked.append(row.state.times))
    row.painter.painted = [1, *row.painter.painted[1:]]
    assert asked == [None], "the stroke was run before"
    row.painter._handle_custom_msg({"do": "undo"}, [])
    assert asked == [None, None]
    assert row.painter.painted[0] == UNPAINTED


def test_a_new_picture_begins_unpainted(explorer):
    first = explorer.picture.value
    explorer.rows[0].painter.painted = [1] * 16
    explorer.picture.value = explorer.picture.options[3]
    assert explorer.states[0].gated.picture.name == "scenes:easy #3"
    assert (explorer.states[0].painted == UNPAINTED).all()
    explorer.source.value = "scenes: hard"
    assert explorer.states[0].gated.picture.name == "scenes:hard #0"
    explorer.source.value = "scenes: easy"
    explorer.picture.value = first
    assert (explorer.states[0].painted == 1).all(), "each picture keeps its strokes"
    explorer.undo.click()
    assert (explorer.states[0].painted == UNPAINTED).all()
    explorer.redo.click()
    assert (explorer.states[0].painted == 1).all()


def test_two_models_side_by_side(explorer):
    assert len(explorer.states) == 1
    assert explorer.rows[1].box.layout.display == "none"
    explorer.second.value = "other"
    one, two = explorer.states
    assert (one.gated.loaded.name, two.gated.loaded.name) == ("mini", "other")
    assert explorer.rows[1].box.layout.display is None
    explorer.budget.value = 50
    assert one.gated.soft.tolist() != two.gated.soft.tolist()
    assert all(s.numbers()["macs_share"] == pytest.approx(0.5, abs=0.05) for s in explorer.states)
    explorer.second.value = ""
    assert len(explorer.states) == 1


def test_what_cannot_be_loaded_gives_a_message_and_changes_nothing(explorer):
    before = explorer.states[0]
    explorer.model.options = [*explorer.model.options, ("nonsense", "nonsense")]
    explorer.model.value = "nonsense"
    assert "neither" in explorer.message.value
    assert explorer.states[0] is before
    assert explorer.model.value == "mini"
    explorer.folder.value = "no/such/<folder>"
    assert "there is no folder no/such/&lt;folder&gt;" in explorer.message.value
    explorer.threshold.value = 0.9
    assert explorer.message.value == ""


def test_a_very_large_folder_is_read_with_signs_of_life_and_a_limit(explorer, tmp_path, monkeypatch):
    for i in range(5):
        Image.new("RGB", (8, 8), GREY).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(sources, "SIGN", 2)
    monkeypatch.setattr(sources, "MOST_PICTURES", 3)
    said = []
    explorer.message.observe(lambda change: said.append(change["new"]), "value")
    explorer.folder.value = str(tmp_path)
    assert "pictures among 2 files of" in said[0]
    assert "<progress></progress>" in said[0]
    assert len(explorer.picture.options) == 3
    assert "holds more files: these are 3 pictures" in explorer.message.value
    assert "msvit-good" in explorer.message.value


def test_uploads_good_and_bad_at_once(explorer):
    good = encoded(Image.new("RGB", (30, 60), GREY))
    explorer.upload.value = files_of(bad_png=b"text", good_png=good, bomb_png=bomb(30000))
    assert explorer.source.value == "uploads"
    assert explorer.states[0].gated.picture.name == "good.png"
    assert "bad.png is no picture" in explorer.message.value
    assert "bomb.png has 900 megapixels" in explorer.message.value
    shown = explorer.states[0]
    explorer.upload.value = files_of(bad_png=b"text")
    assert explorer.states[0] is shown


def test_saved_files_and_their_link(explorer, tmp_path):
    explorer.save_svg.click()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    tokens = explorer.states[0].tokens
    stem = f"mini_scenes-easy--0_{tokens}-tokens"
    assert names == [f"{stem}.json", f"{stem}.svg"]
    assert "data:image/svg+xml;base64," in explorer.message.value
    explorer.save_svg.click()
    assert {path.name for path in (tmp_path / "out").iterdir()} - set(names) == {f"{stem}-2.json", f"{stem}-2.svg"}
    assert explorer.states[0].times.dense.low > 0


def test_a_mask_goes_to_a_file_and_comes_back(explorer, tmp_path):
    explorer.threshold.value = 0.5
    coarse = explorer.states[0].coarse
    explorer.save_mask.click()
    saved = {path.suffix: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert saved.keys() == {".png", ".npy"}
    for suffix, data in saved.items():
        explorer.threshold.value = 1.0
        explorer.load_mask.value = files_of(**{f"mask_{suffix[1:]}": data})
        assert np.array_equal(explorer.states[0].coarse, coarse)
        explorer.undo.click()
        assert not explorer.states[0].coarse.any(), "a mask is one stroke"
    explorer.load_mask.value = files_of(mask_png=b"text")
    assert "mask.png is no mask" in explorer.message.value


def test_without_a_model_the_shipped_one_for_the_pictures_is_shown(tmp_path, monkeypatch):
    explorer = open_explorer(runs=tmp_path, out=tmp_path)
    assert (explorer.model.value, explorer.source.value) == ("scenes", "scenes: middle")
    assert explorer.states[0].numbers()["truth"] == explorer.states[0].numbers()["prediction"]
    mini_model().save_pretrained(tmp_path / "photo")
    monkeypatch.setattr("msvit.explorer.models.shipped", lambda: ["photo", "scenes"])
    monkeypatch.setattr("msvit.explorer.page.shipped", lambda: ["photo", "scenes"])
    explorer._loaded["photo"] = LoadedModel.of("photo", mini_model())
    explorer.model.options = [("photo", "photo"), *explorer.model.options]
    explorer.source.value = "photographs"
    assert explorer.states[0].gated.loaded.name == explorer.model.value == "photo"
    explorer.source.value = "scenes: hard"
    assert explorer.model.value == "scenes"


def test_a_copy_without_a_kernel_has_a_picture(explorer):
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["image/png"].startswith("iVBOR")


def test_an_impossible_budget_is_refused(loaded, tmp_path):
    with pytest.raises(ValueError, match="budget=1.5"):
        open_explorer(loaded, budget=1.5)


@pytest.mark.long
def test_a_classifier_beside_a_segmenter(segmenter, tmp_path):
    pair = segmenter, LoadedModel.of("names", mini_model())
    explorer = open_explorer(*pair, source="scenes: easy", runs=tmp_path, out=tmp_path)
    assert "of pixels right" in explorer.rows[0].figures.value
    assert "it is " in explorer.rows[1].figures.value
    explorer.budget.value = 60
    assert all(s.numbers()["macs_share"] == pytest.approx(0.6, abs=0.05) for s in explorer.states)
    with Image.open(explorer.save(kinds=("png",))[0]) as picture:
        assert picture.width > 5 * drawing.PANEL_WIDTH
    explorer.model.value, explorer.second.value = "names", ""
    assert explorer.rows[0].boxes["Error"].layout.display == "none"
    assert explorer.rows[0].boxes["Class probabilities"].layout.display is None


def test_the_layer_slider_shows_the_nearest_stage_and_runs_nothing(tmp_path):
    one, two = reduced("tome", layers=[0, 2]), reduced("grid", layers=[1])
    explorer = open_explorer(one, two, runs=tmp_path, out=tmp_path)
    assert dict(explorer.layer.options) == {
        "after the tokenizer": -1,
        "at block 0": 0,
        "at block 1": 1,
        "at block 2": 2,
    }
    assert explorer.layer.layout.display is None
    assert [state.token_map.layer for state in explorer.states] == [2, 1]
    calls, images = [], [row.images[TOKEN_MAP_TITLE].value for row in explorer.rows]
    one.model.vit.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    explorer.layer.value = -1
    assert [state.token_map.layer for state in explorer.states] == [-1, -1]
    assert all(row.images[TOKEN_MAP_TITLE].value != image for row, image in zip(explorer.rows, images, strict=True))
    explorer.layer.value = 0
    assert explorer.states[0].token_map.layer == 0
    assert not calls
    explorer.threshold.value = 0.3
    assert explorer.states[0].token_map.layer == 0, "another threshold, the same layer"
    explorer.second.value = ""
    assert [value for _, value in explorer.layer.options] == [-1, 0, 2]
    assert explorer.layer.value == explorer.rows[0].layer == 2


def test_models_without_a_reducer_have_no_layers(tmp_path):
    explorer = open_explorer(LoadedModel.of("mini", mini_model()), reduced("tome"), runs=tmp_path, out=tmp_path)
    assert explorer.layer.layout.display is None
    assert explorer.rows[0].boxes[TOKEN_MAP_TITLE].layout.display == "none"
    explorer.layer.value = 0
    assert explorer.states[0].numbers()["stages"] == []
    explorer.second.value = ""
    assert explorer.layer.layout.display == "none"
