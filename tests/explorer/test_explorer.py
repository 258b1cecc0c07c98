"""The explorer without a browser: what it computes, what it draws, and what it says to hostile pictures."""

from datetime import UTC, datetime

import numpy as np
import pytest
import timm
import torch
from helpers import COMMON, bomb, check_panels, encoded, gradient, mini_model
from PIL import Image

import msvit
from msvit.data.scenes import Scenes
from msvit.explorer import drawing, panels, sources
from msvit.explorer import export as sheet
from msvit.explorer import models as gallery
from msvit.explorer import state as view
from msvit.explorer.models import ModelError
from msvit.explorer.sources import Shot
from msvit.explorer.uploads import MEGAPIXELS, PictureError, read_picture

GREY = (120, 130, 140)


@pytest.fixture
def subject():
    return gallery.describe("mini", mini_model())


@pytest.fixture
def look(subject):
    return view.look(subject, sources.SceneSource("easy").shot("#1 rows", subject.size))


# ---- what is computed


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.55, 1.0])
def test_the_view_is_what_the_model_computes(subject, look, threshold):
    subject.model.threshold = threshold
    with torch.inference_mode():
        result = subject.model.run(look.pixels)
    state = view.see(look, threshold)
    assert np.array_equal(state.coarse, result.coarse[0].numpy())
    assert np.allclose(look.scores, result.scores[0].numpy())
    assert np.allclose(look.soft, result.gates[0].numpy())
    assert state.tokens == result.tokens.item()
    assert state.macs == result.macs.item()
    assert np.allclose(state.probabilities, result.logits[0].softmax(0).numpy(), atol=1e-6)


def test_painting_overrules_the_gate(look):
    gated = view.see(look, 0.5)
    painted = np.full(look.soft.shape, view.FREE)
    painted[0], painted[3, 3] = 1, 0
    state = view.see(look, 0.5, painted)
    assert state.coarse[0].all()
    assert not state.coarse[3, 3]
    free = painted == view.FREE
    assert np.array_equal(state.coarse[free], gated.coarse[free])
    assert state.tokens == 1 + state.coarse.sum() + 4 * (~state.coarse).sum()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_budget_is_met_as_nearly_as_regions_allow(look, share):
    """With all m distinct any number of coarse regions can be had, so the error is half a region's worth at most."""
    counts = torch.arange(look.soft.size + 1)
    shares = look.subject.model.macs_of(counts, (64, 64)).numpy() / look.subject.model.dense_macs((64, 64))
    reached = look.share(look.cut(share))
    assert len(np.unique(look.soft)) == look.soft.size
    assert abs(reached - share) == pytest.approx(np.abs(shares - share).min())
    assert view.see(look, look.cut(share)).numbers()["macs_share"] == pytest.approx(reached)


def test_the_gate_runs_once_for_all_thresholds(subject, look):
    calls = []
    subject.model.gate.register_forward_hook(lambda *_: calls.append(1))
    for threshold in (0.2, 0.5, 0.8):
        view.see(look, threshold)
    assert not calls


def test_coarse_regions_are_really_coarse(subject, look):
    painted = np.zeros(look.soft.shape, int)
    painted[1, 2] = 1
    seen = view.as_the_model_sees(view.see(look, 0.5, painted))
    image = np.asarray(look.shot.image)
    outside = np.ones((64, 64), bool)
    outside[16:32, 32:48] = False
    assert np.array_equal(seen[outside], image[outside])
    blocks = seen[16:32, 32:48].reshape(8, 2, 8, 2, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    pooled = torch.nn.functional.avg_pool2d(look.pixels, 2)[0, :, 8:16, 16:24].permute(1, 2, 0).numpy()
    assert np.abs((pooled * subject.std + subject.mean) * 255 - blocks[:, 0, :, 0]).max() <= 0.51


def test_a_picture_that_is_not_square():
    model = msvit.MSViT(timm.create_model("vit_mini_patch8_64", img_size=(48, 96))).eval()
    subject = gallery.describe("wide", model)
    state = view.see(view.look(subject, Shot("grey", Image.new("RGB", (96, 48), GREY))), 0.5)
    assert subject.size == (48, 96)
    assert state.coarse.shape == (3, 6)
    assert panels.picture_panel(state).size == (drawing.SIDE, drawing.SIDE // 2)
    assert sheet.as_png([state])


# ---- what is drawn


def test_panels_have_one_width_and_show_the_state(look):
    check_panels(look, [*COMMON, "Class probabilities"])


def test_colours_grow_lighter_from_fine_to_coarse():
    colours = drawing.colours(np.linspace(0, 1, 64)).astype(int)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness) > 0).all()
    assert colours[0, 2] > 2 * colours[0, 0]
    assert colours[-1, 0] > 2 * colours[-1, 2]


def test_a_file_says_what_the_screen_says(look, tmp_path):
    states = [view.see(look, 0.3), view.see(look, 0.7)]
    files = {path.suffix: path for path in sheet.save(states, tmp_path / "new", "two")}
    assert files.keys() == {".png", ".svg", ".json"}
    with Image.open(files[".png"]) as picture:
        assert picture.width > 5 * drawing.SIDE
    text = files[".svg"].read_text()
    for state in states:
        assert f"{state.tokens} of 65 tokens" in text
        assert f">{state.tokens}</b> of 65 tokens" in sheet.figures_html(state)
    assert text.count("<image") == 10


def test_names_cannot_carry_html(subject):
    look = view.look(subject, Shot("<img src=x onerror=alert(1)>.png", Image.new("RGB", (64, 64), GREY)))
    state = view.see(look, 0.5)
    assert "<img" not in sheet.figures_html(state)
    assert "<img" not in sheet.as_svg([state])


@pytest.mark.parametrize(("macs", "text"), [(1.2537e9, "1.25 GMACs"), (13.4e6, "13.4 MMACs")])
def test_macs_are_said_as_macs(macs, text):
    assert sheet.macs_text(macs) == text


# ---- pictures from strangers


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("text.png", b"this is no picture, whatever its name", "text.png is no picture.*choose one of PNG"),
        ("empty.png", b"", "empty.png is empty"),
        ("page.html.png", b"<html><script>alert(1)</script>", "is no picture"),
        ("cut.jpg", encoded(gradient(), "JPEG")[:-200], r"cut.jpg \(JPEG, 64 x 48 px\) is damaged or incomplete"),
        ("cut.png", encoded(gradient())[:60], "cut.png .*is damaged or incomplete"),
        ("figure.eps", encoded(gradient(), "EPS"), "is no picture"),
        ("floats.tif", encoded(Image.new("F", (8, 8)), "TIFF"), "floats"),
        ("bomb.png", bomb(30000), f"bomb.png has 900 megapixels and was not decoded; the limit is {MEGAPIXELS}"),
        ("large.png", bomb(8200), "large.png has 67 megapixels and was not decoded"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.count(".") else "",
)
def test_what_is_no_picture_is_refused_with_a_reason(name, data, said):
    with pytest.raises(PictureError, match=said):
        read_picture(data, name)


@pytest.mark.parametrize(
    ("data", "pixel"),
    [
        (encoded(Image.new("1", (9, 9), 1)), (255, 255, 255)),
        (encoded(Image.new("I;16", (9, 9), 257 * 100)), (100, 100, 100)),
        (encoded(Image.new("L", (9, 9), 7)), (7, 7, 7)),
        (encoded(Image.new("CMYK", (9, 9), (0, 0, 0, 255)), "TIFF"), (0, 0, 0)),
        (encoded(Image.new("CMYK", (9, 9), (0, 0, 0, 0)), "JPEG"), (255, 255, 255)),
        (encoded(Image.new("RGBA", (9, 9), (0, 0, 0, 0))), (255, 255, 255)),
        (encoded(Image.new("RGBA", (9, 9), (200, 0, 0, 255))), (200, 0, 0)),
        (encoded(Image.new("LA", (9, 9), (0, 0))), (255, 255, 255)),
        (encoded(Image.new("P", (9, 9), 0), "GIF"), (0, 0, 0)),
        (encoded(Image.new("RGB", (1, 1), GREY)), GREY),
        (encoded(Image.new("RGB", (3000, 1), GREY)), GREY),
        (encoded(Image.new("RGB", (9, 9), GREY), "WEBP", lossless=True), GREY),
        (encoded(Image.new("RGB", (9, 9), GREY), "BMP"), GREY),
    ],
    ids=["1-bit", "16-bit", "grey", "CMYK TIFF", "CMYK JPEG", "clear", "opaque", "grey and clear", "palette", "1 x 1",
         "3000 x 1", "WEBP", "BMP"],
)  # fmt: skip
def test_odd_pictures_are_shown_right(tmp_path, data, pixel):
    shot = sources.Source({"odd": data}).shot("odd", (48, 64))
    assert shot.image.size == (64, 48)
    assert shot.image.mode == "RGB"
    assert {tuple(p) for p in np.asarray(shot.image).reshape(-1, 3).tolist()} == {pixel}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_upright(orientation):
    upright = Image.new("RGB", (64, 32), "white")
    upright.paste((200, 0, 0), (0, 0, 32, 16))
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL's transposition that undoes what EXIF's number asks for
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(turns[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = read_picture(encoded(stored, "PNG", exif=exif), "turned.png")
    assert np.array_equal(np.asarray(image), np.asarray(upright))


# ---- models and pictures to choose from


def test_models_are_found_and_loaded(tmp_path):
    mini_model(1).save_pretrained(tmp_path / "runs/deep/one")
    (tmp_path / "runs/half").mkdir()
    (tmp_path / "runs/half/config.json").write_text("{}")
    runs = tmp_path / "runs"
    assert gallery.find_models(runs) == ["demo", "deep/one", "deit_tiny_patch16_224"]
    assert gallery.find_models(tmp_path / "none") == ["demo", "deit_tiny_patch16_224"]
    subject = gallery.load_model("deep/one", runs)
    assert subject.classes == tuple(f"class {i}" for i in range(8))
    assert gallery.load_model(str(runs / "deep/one"), "elsewhere").size == (64, 64)
    with pytest.raises(ModelError, match="holds no model that can be read"):
        gallery.load_model("half", runs)
    with pytest.raises(ModelError, match="'nonsense' is neither"):
        gallery.load_model("nonsense", runs)
    with pytest.raises(ModelError, match="resnet18: ResNet is no plain vision transformer"):
        gallery.load_model("resnet18", runs)
    (runs / "deep/one/model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="holds no model that can be read"):
        gallery.load_model("deep/one", runs)


def test_a_run_brings_its_classes_and_its_normalisation(tmp_path):
    from msvit.training.recipe import Recipe
    from msvit.training.runs import RunFolder

    records = RunFolder(tmp_path / "run")
    records.open(Recipe(data="scenes:middle"))
    records.save_model(mini_model())
    records.save_model(mini_model(), "dense")
    records.close()
    subject = gallery.load_model("run", tmp_path)
    assert subject.classes[4] == "wide rows"
    middle = Scenes(4, difficulty="middle", split="val")
    name = sources.SceneSource("middle").names()[2]
    shot = sources.SceneSource("middle").shot(name, (64, 64))
    assert torch.allclose(view.look(subject, shot).pixels[0], middle[2][0], atol=1e-5)
    assert name == f"#2 {shot.truth}"
    assert "untrained" in gallery.load_model("run/dense", tmp_path).note


def test_the_demo_is_trained_once_and_anew_if_it_is_torn(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    small = {"train_n": 64, "val_n": 16, "batch": 32, "epochs_dense": 1, "epochs": 1}
    monkeypatch.setattr(gallery, "DEMO_RECIPE", gallery.DEMO_RECIPE.replace(**small))
    weights = gallery.train_demo() / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert gallery.load_model("demo", tmp_path).classes[0] == "rows"
    assert weights.stat().st_mtime_ns == written
    weights.write_bytes(b"torn")
    assert gallery.load_model("demo", tmp_path).size == (64, 64)


def test_photographs_come_with_packages():
    source = sources.sources().get("photographs")
    if source is None:
        pytest.skip("neither scikit-learn nor matplotlib is installed")
    for name in source.names():
        shot = source.shot(name, (224, 160))
        assert shot.image.size == (160, 224)
        assert np.asarray(shot.image).std() > 20


def test_a_folder_of_pictures(tmp_path):
    (tmp_path / "inner").mkdir()
    Image.new("RGB", (9, 9), GREY).save(tmp_path / "inner/a.png")
    (tmp_path / "notes.txt").write_text("no picture")
    source = sources.folder_source(tmp_path)
    assert source.names() == ["inner/a.png"]
    (tmp_path / "inner/a.png").unlink()
    with pytest.raises(PictureError, match="inner/a.png cannot be read"):
        source.shot("inner/a.png", (8, 8))
    with pytest.raises(PictureError, match="holds no picture"):
        sources.folder_source(tmp_path)
    with pytest.raises(PictureError, match="there is no folder"):
        sources.folder_source(tmp_path / "none")


# ---- the page, driven by its traits as a browser drives it


@pytest.fixture
def explorer(subject, tmp_path):
    pytest.importorskip("anywidget", reason="anywidget is not installed (extra `notebooks`)")
    from msvit.explorer import Explorer

    mini_model(1).save_pretrained(tmp_path / "runs/other")
    return Explorer(subject, runs=tmp_path / "runs", out=tmp_path / "out")


def files_of(**files):
    return [{"name": name.replace("_", "."), "type": "", "size": len(data), "content": memoryview(data),
             "last_modified": datetime(2026, 1, 1, tzinfo=UTC)} for name, data in files.items()]  # fmt: skip


def test_a_slider_moves_everything_and_the_other_slider(explorer):
    row = explorer.rows[0]
    shown = [row.images[title] for title in panels.shown(row.look.subject) if title in row.images]
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
    assert set(row.painter.painted) == {view.FREE}
    row.painter.painted = [1, 1]  # what a browser sends late, of another grid, counts for nothing
    assert row.state.tokens == 65


def test_a_new_picture_begins_unpainted(explorer):
    explorer.rows[0].painter.painted = [1] * 16
    explorer.picture.value = explorer.picture.options[3]
    assert explorer.states[0].look.shot.name == "easy scene #3"
    assert (explorer.states[0].painted == view.FREE).all()
    explorer.source.value = "scenes: hard"
    assert explorer.states[0].look.shot.name == "hard scene #0"


def test_two_models_side_by_side(explorer):
    assert len(explorer.states) == 1
    assert explorer.rows[1].box.layout.display == "none"
    explorer.second.value = "other"
    one, two = explorer.states
    assert (one.look.subject.name, two.look.subject.name) == ("mini", "other")
    assert explorer.rows[1].box.layout.display is None
    explorer.budget.value = 50
    assert one.look.soft.tolist() != two.look.soft.tolist()
    assert all(s.numbers()["macs_share"] == pytest.approx(0.5, abs=0.05) for s in explorer.states)
    explorer.second.value = ""
    assert len(explorer.states) == 1


def test_what_cannot_be_loaded_is_said_and_nothing_else_changes(explorer):
    before = explorer.states[0]
    explorer.model.options = [*explorer.model.options, "nonsense"]
    explorer.model.value = "nonsense"
    assert "neither" in explorer.message.value
    assert explorer.states[0] is before
    assert explorer.model.value == "mini"
    explorer.folder.value = "no/such/<folder>"
    assert "there is no folder no/such/&lt;folder&gt;" in explorer.message.value
    explorer.threshold.value = 0.9
    assert explorer.message.value == ""


def test_uploads_good_and_bad_at_once(explorer):
    good = encoded(Image.new("RGB", (30, 60), GREY))
    explorer.upload.value = files_of(bad_png=b"text", good_png=good, bomb_png=bomb(30000))
    assert explorer.source.value == "uploads"
    assert explorer.states[0].look.shot.name == "good.png"
    assert "bad.png is no picture" in explorer.message.value
    assert "bomb.png has 900 megapixels" in explorer.message.value
    shown = explorer.states[0]
    explorer.upload.value = files_of(bad_png=b"text")
    assert explorer.states[0] is shown


def test_saved_files_and_their_link(explorer, tmp_path):
    explorer.save_svg.click()
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    tokens = explorer.states[0].tokens
    assert names == [f"mini_easy-scene--0_{tokens}-tokens.json", f"mini_easy-scene--0_{tokens}-tokens.svg"]
    assert "data:image/svg+xml;base64," in explorer.message.value


def test_a_copy_without_a_kernel_has_a_picture(explorer):
    bundle = explorer._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["image/png"].startswith("iVBOR")


def test_an_impossible_budget_is_refused(subject, tmp_path):
    pytest.importorskip("anywidget", reason="anywidget is not installed (extra `notebooks`)")
    from msvit.explorer import Explorer

    with pytest.raises(ValueError, match="budget=1.5"):
        Explorer(subject, budget=1.5)
