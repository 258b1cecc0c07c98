"""The explorer on other models than gated classifiers: segmenters, token reducers, rules in the gate's place."""

import json

import numpy as np
import pytest
import timm
import torch
from helpers import COMMON, check_panels, mini_model, segmenting
from PIL import Image

import msvit
from msvit.core.fast_linear import fast_linear
from msvit.data.scenes import Scenes
from msvit.data.segmentation import IGNORE
from msvit.explorer import drawing, panels, segpanels, sources
from msvit.explorer import export as sheet
from msvit.explorer import models as gallery
from msvit.explorer import state as view
from msvit.explorer.models import ModelError
from msvit.explorer.uploads import PictureError
from msvit.gating.rules import make_rule
from msvit.reducers.registry import make_reducer
from msvit.training.recipe import Recipe
from msvit.training.runs import RunFolder

ENDED, SEGMENTED = panels.ENDED, ["Prediction", "Ground truth", "Error"]


def segmenter_of(seed=0, reducer=None, classes=None, **settings):
    torch.manual_seed(seed)
    vit = timm.create_model("vit_mini_patch8_64", num_classes=0)
    parts = {"reducer": make_reducer(reducer, vit)} if reducer else {}
    classes = Scenes(1, difficulty="easy").regions if classes is None else classes
    model = segmenting(msvit.MSViT(vit, **parts), classes, **settings).eval()
    model.head.decoder.head.weight.data.normal_()  # so that there are several classes in a prediction
    return model


def reduced(name, **settings):
    model = mini_model()
    model.reducer = make_reducer(name, model.vit, **settings)
    return gallery.describe(name, model.eval())


def shot_of(subject, index=1):
    source = sources.SceneSource("easy")
    return source.shot(source.names()[index], subject.size)


def looked(subject, index=1):
    return view.look(subject, shot_of(subject, index))


def open_explorer(*subjects, **settings):
    pytest.importorskip("anywidget", reason="anywidget is not installed (extra `notebooks`)")
    from msvit.explorer import Explorer

    return Explorer(*subjects, **settings)


def is_ink(panel, box):
    """Whether anything but the background is drawn in a box."""
    return len(np.unique(np.asarray(panel.crop(box)).reshape(-1, 3), axis=0)) > 1


# ---- segmentation


@pytest.fixture
def segmenter():
    return gallery.describe("pixels", segmenter_of())


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_a_segmentation_is_what_the_model_computes(segmenter, threshold):
    look = looked(segmenter)
    segmenter.model.threshold = threshold
    with torch.inference_mode():
        result = segmenter.model.run(look.pixels)
    state = view.see(look, threshold)
    assert np.array_equal(state.labels, result.logits[0].argmax(0).numpy())
    assert len(np.unique(state.labels)) > 1
    assert (state.tokens, state.macs) == (result.tokens.item(), result.macs.item())


def test_the_figures_of_a_segmentation(segmenter):
    look = looked(segmenter)
    mask = Scenes(2, difficulty="easy", split="val").mask(1)
    assert np.array_equal(look.truth, mask)
    state = view.see(look, 0.5)
    n = state.numbers()
    ious = {}
    for k, name in enumerate(segmenter.classes):
        either = (state.labels == k) | (mask == k)
        if either.any():
            ious[name] = ((state.labels == k) & (mask == k)).sum() / either.sum()
    assert n["accuracy"] == pytest.approx((state.labels == mask).mean())
    assert n["iou"] == pytest.approx(ious)
    assert n["miou"] == pytest.approx(np.mean(list(ious.values())))
    assert n["truth"]["background"] == pytest.approx((mask == 0).mean())
    assert sum(n["prediction"].values()) == pytest.approx(1)
    assert f"{n['accuracy']:.1%} of pixels right</b> mean IoU {n['miou']:.1%}" in sheet.figures_html(state)


def test_a_truth_of_other_classes_is_unknown():
    subject = gallery.describe("other", segmenter_of(classes=[f"thing {k}" for k in range(10)]))
    look = looked(subject)
    assert look.truth is None
    state = view.see(look, 0.5)
    assert state.numbers()["accuracy"] is None
    assert "ground truth unknown" in sheet.caption(state)[0]
    panel = panels.PANELS["Error"].draw(state)
    assert is_ink(panel, (0, 200, 448, 260)), "it says why"


def test_panels_of_a_segmenter(segmenter):
    check_panels(looked(segmenter), [*COMMON, *SEGMENTED])


def test_label_maps_name_and_number_the_classes_seen():
    labels = np.zeros((64, 64), int)
    labels[:, 32:], labels[:8] = 3, IGNORE
    panel = segpanels.label_panel(labels, tuple("abcdef"))
    pixels = np.asarray(panel)
    colours = {tuple(c) for c in pixels[:448].reshape(-1, 3).tolist()}
    assert {segpanels.colour_of(0), segpanels.colour_of(3), segpanels.HATCH} <= colours
    assert not {segpanels.colour_of(k) for k in (1, 2, 4, 5)} & colours
    assert {tuple(c) for c in pixels[:50].reshape(-1, 3).tolist()} == {segpanels.PLAIN, segpanels.HATCH}
    assert is_ink(panel, (60, 230, 164, 280)), "a number on the left area"
    few = segpanels.label_panel(np.zeros((64, 64), int), tuple("abcdef"))
    assert segpanels.colour_of(3) in {tuple(c) for c in pixels[448:].reshape(-1, 3).tolist()}, "in the legend"
    assert segpanels.colour_of(3) not in {tuple(c) for c in np.asarray(few)[448:].reshape(-1, 3).tolist()}
    everything = segpanels.label_panel(np.arange(64 * 64).reshape(64, 64) % 150, tuple(map(str, range(150))))
    assert everything.height < 448 + 250, "a legend names some of very many classes"


def test_class_colours_differ():
    assert len({segpanels.colour_of(k) for k in range(28)}) == 28
    first = np.array([segpanels.colour_of(k) for k in range(10)], float)
    # As the two commonest kinds of colour-blindness see them (Viénot, Brettel and Mollon 1999, on linear light).
    linear = (first / 255) ** 2.2
    for rows in (((0.11238, 0.88762, 0), (0.11238, 0.88762, 0), (0.00401, -0.00401, 1)),
                 ((0.29275, 0.70725, 0), (0.29275, 0.70725, 0), (-0.02234, 0.02234, 1))):  # fmt: skip
        seen = 255 * (linear @ np.array(rows).T).clip(0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=2) + 1e3 * np.eye(10)
        assert distances.min() > 20


def test_the_error_panel_shows_what_is_wrong_and_leaves_ignored_pixels_alone(segmenter):
    look = looked(segmenter)
    truth = look.shot.labels.copy()
    truth[:16] = IGNORE
    look = view.look(segmenter, look.shot._replace(labels=truth))
    state = view.see(look, 0.5)
    wrong = (state.labels != truth) & (truth != IGNORE)
    shown = np.asarray(panels.PANELS["Error"].draw(state))[3:448:7, 3:448:7]
    assert wrong.any()
    assert np.array_equal((shown == drawing.WRONG).all(2), wrong)
    assert {tuple(c) for c in shown[:16].reshape(-1, 3).tolist()} <= {segpanels.PLAIN, segpanels.HATCH}
    assert (shown == segpanels.NEAR).all(2).any()
    assert state.score.accuracy == pytest.approx(1 - wrong.sum() / (truth != IGNORE).sum())
    blank = view.look(segmenter, look.shot._replace(labels=np.full_like(truth, IGNORE)))
    assert json.dumps(view.see(blank, 0.5).numbers(), allow_nan=False)
    assert sheet.as_png([view.see(blank, 0.5)])


def test_a_run_of_segmentation_can_be_chosen(tmp_path):
    records = RunFolder(tmp_path / "run")
    records.open(Recipe(task="segment"))
    records.save_model(segmenter_of(decoder="linear"))
    records.save_model(segmenter_of(), "dense")
    records.close()
    assert gallery.find_models(tmp_path) == ["demo", "run", "run/dense", "deit_tiny_patch16_224"]
    subject = gallery.load_model("run", tmp_path)
    assert subject.segments
    assert subject.classes == tuple(Scenes(1).regions)
    assert subject.mean == Scenes.mean
    assert subject.note == ""
    assert looked(subject).truth is not None
    assert "untrained" in gallery.load_model("run/dense", tmp_path).note
    explorer = open_explorer("run", runs=tmp_path, out=tmp_path / "out")
    row = explorer.rows[0]
    visible = [title for title, box in row.boxes.items() if box.layout.display != "none"]
    assert visible == [*COMMON, *SEGMENTED]
    assert all(row.images[title].value for title in SEGMENTED)
    before = row.images["Prediction"].value
    explorer.threshold.value = 1.0
    row.painter.painted = [1] * 16
    assert row.state.tokens == 17
    assert row.images["Prediction"].value != before
    explorer.save_png.click()
    numbers = json.loads(next((tmp_path / "out").glob("*.json")).read_text())
    assert numbers[0]["accuracy"] == pytest.approx(row.state.score.accuracy)


def test_a_classifier_beside_a_segmenter(segmenter, tmp_path):
    explorer = open_explorer(segmenter, gallery.describe("names", mini_model()), runs=tmp_path, out=tmp_path)
    assert "of pixels right" in explorer.rows[0].figures.value
    assert "it is " in explorer.rows[1].figures.value
    explorer.budget.value = 60
    assert all(s.numbers()["macs_share"] == pytest.approx(0.6, abs=0.05) for s in explorer.states)
    with Image.open(explorer.save(kinds=("png",))[0]) as picture:
        assert picture.width > 5 * drawing.SIDE
    explorer.model.value, explorer.second.value = "names", ""
    assert explorer.rows[0].boxes["Error"].layout.display == "none"
    assert explorer.rows[0].boxes["Class probabilities"].layout.display is None


def labelled_folder(root, size=(30, 40)):
    """CamVid's layout: the left half is class 0, the right class 2, the top row of value 1 is none."""
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (root / split / part).mkdir(parents=True)
        values = np.zeros(size, np.uint8)
        values[:, size[1] // 2 :], values[0] = 2, 1
        Image.fromarray(values * 100).convert("RGB").save(root / split / "images/a.jpg", quality=100)
        Image.fromarray(values).save(root / split / "labels/a.png")
    (root / "classes.json").write_text(json.dumps({"names": ["left", "void", "right"]}))
    return root


def test_label_maps_of_a_folder_go_with_their_pictures(tmp_path):
    source = sources.folder_source(labelled_folder(tmp_path))
    assert source.names() == ["val/images/a.jpg", "train/images/a.jpg"], "label maps are no pictures"
    shot = source.shot("val/images/a.jpg", (30, 30))
    assert shot.regions == ("left", "right")
    assert shot.labels.shape == (30, 30)
    assert np.array_equal(shot.labels[1:], np.tile([0] * 15 + [1] * 15, (29, 1)))
    assert (shot.labels[0] == IGNORE).all()
    assert np.asarray(shot.image)[5, [2, 27], 0].tolist() == pytest.approx([0, 200], abs=3)
    subject = gallery.describe("two", segmenter_of(classes=["left", "right"]))
    assert looked(subject).truth is None
    assert view.look(subject, source.shot("val/images/a.jpg", subject.size)).truth is not None
    path = tmp_path / "val/labels/a.png"
    Image.fromarray(np.full((30, 40), 7, np.uint8)).save(path)
    with pytest.raises(PictureError, match=r"a.png holds the values \[7\]"):
        source.shot("val/images/a.jpg", (30, 30))
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(path)
    with pytest.raises(PictureError, match="a.png is 30 x 40 px, its picture val/images/a.jpg 40 x 30"):
        source.shot("val/images/a.jpg", (30, 30))
    path.write_bytes(b"torn")
    with pytest.raises(PictureError, match="a.png, the label map of val/images/a.jpg, cannot be read"):
        source.shot("val/images/a.jpg", (30, 30))


# ---- reducers


@pytest.mark.parametrize("name", ["evit", "token_pooling", "tome", "grid", "dynamicvit", "random_pruning"])
def test_stages_are_those_of_the_model(name):
    subject = reduced(name)
    look = looked(subject)
    state = view.see(look, 0.5)
    with torch.inference_mode():
        result = subject.model.run(look.pixels, mask=torch.from_numpy(state.coarse))
    numbers = state.numbers()["stages"]
    assert [stage["layer"] for stage in numbers] == [stage.layer for stage in result.stages]
    assert [stage["tokens"] for stage in numbers] == [int(stage.kept) for stage in result.stages]
    assert [stage["dropped"] for stage in numbers] == [int((stage.where < 0).sum()) for stage in result.stages]
    assert numbers[0] == {"layer": None, "tokens": state.tokens - 1, "dropped": 0}
    assert numbers[-1]["tokens"] == len(np.unique(state.part.where[state.part.where >= 0]))
    left = f", {1 + numbers[-1]['tokens']} left at block {subject.model.reducer.layers[-1]}  ·"
    assert left in sheet.caption(state)[1]


def test_panels_of_a_model_with_a_reducer():
    check_panels(looked(reduced("evit")), [*COMMON, ENDED, "Class probabilities"])


def test_a_token_has_the_mean_colour_of_its_pixels_wherever_they_lie():
    subject = reduced("tome")
    state = view.see(looked(subject), 1.0)
    where = np.zeros((8, 8), int)
    where[:, 4:], where[7, 7], where[0, 0] = 1, 0, view.Part(0, where, 0).where[0, 0] - 1
    state = view.State(**{**vars(state), "parts": (view.Part(0, where, 2),)})
    panel = np.asarray(panels.ended_panel(state))
    pixels, cells = np.asarray(state.look.shot.image, float), where.repeat(8, 0).repeat(8, 1)
    assert np.array_equal(panel[28, 112], panel[420, 420]), "two patches of one token"
    for row, column in ((4, 2), (4, 6)):
        mean = pixels[cells == where[row, column]].mean(0)
        assert np.abs(panel[row * 56 + 28, column * 56 + 28] - mean).max() <= 1
    assert {tuple(c) for c in panel[4:50, 4:50].reshape(-1, 3).tolist()} == {panels.DROPPED, panels.HATCH}
    white = (panel[:448] == 255).all(2)
    assert white[100:300, 222:227].any(1).all(), "a border between the tokens"
    assert not white[100:300, 20:200].any(), "and none within one"


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
    assert [state.part.layer for state in explorer.states] == [2, 1]
    calls, images = [], [row.images[ENDED].value for row in explorer.rows]
    one.model.vit.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    explorer.layer.value = -1
    assert [state.part.layer for state in explorer.states] == [-1, -1]
    assert all(row.images[ENDED].value != image for row, image in zip(explorer.rows, images, strict=True))
    explorer.layer.value = 0
    assert explorer.states[0].part.layer == 0
    assert not calls
    explorer.threshold.value = 0.3
    assert explorer.states[0].part.layer == 0, "another threshold, the same layer"
    explorer.second.value = ""
    assert [value for _, value in explorer.layer.options] == [-1, 0, 2]
    assert explorer.layer.value == explorer.rows[0].layer == 2


def test_models_without_a_reducer_have_no_layers(tmp_path):
    explorer = open_explorer(gallery.describe("mini", mini_model()), reduced("tome"), runs=tmp_path, out=tmp_path)
    assert explorer.layer.layout.display is None
    assert explorer.rows[0].boxes[ENDED].layout.display == "none"
    explorer.layer.value = 0
    assert explorer.states[0].numbers()["stages"] == []
    explorer.second.value = ""
    assert explorer.layer.layout.display == "none"


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.5}])
def test_a_budget_counts_what_a_reducer_saves(settings):
    """Where the counts depend on what the picture shows, the model is run for them."""
    subject = reduced("dynamicvit", keep=0.7, layers=[1], **settings)
    assert subject.closed == (not settings)
    look = looked(subject)
    target = (look.share(0.0) + look.share(1.0)) / 2
    assert look.share(1.0) - look.share(0.0) > 0.2
    state = view.see(look, look.cut(target))
    assert state.numbers()["macs_share"] == pytest.approx(look.share(state.threshold))
    assert state.numbers()["macs_share"] == pytest.approx(target, abs=0.04)
    subject.model.threshold = state.threshold
    with torch.inference_mode():
        assert state.macs == subject.model.run(look.pixels).macs.item()


def test_a_segmenter_with_a_reducer():
    subject = gallery.describe("both", segmenter_of(reducer="tome"))
    look = looked(subject)
    check_panels(look, [*COMMON, ENDED, *SEGMENTED])
    assert sheet.as_svg([view.see(look, 0.5)]).count("<image") == 8


# ---- rules


@pytest.mark.parametrize(("name", "settings"), [("random", {"rate": 0.4}), ("centre", {}), ("entropy", {"bits": 4.0})])
def test_a_rule_stands_in_the_gates_place(name, settings, tmp_path):
    model = mini_model()
    model.gate = make_rule(name, **settings)
    model.save_pretrained(tmp_path / name)
    subject = gallery.load_model(name, tmp_path)
    assert "no gate: the rule" in subject.note
    assert name in subject.note.lower()
    look = looked(subject)
    assert look.scores is None
    with torch.inference_mode():
        result = subject.model.run(look.pixels)
    state = view.see(look, subject.model.threshold)
    assert np.array_equal(state.coarse, result.coarse[0].numpy())
    assert state.macs == result.macs.item()
    assert state.numbers()["scores"] is None
    assert np.allclose(state.numbers()["soft"], result.gates[0])
    assert view.see(look, look.cut(1.0)).tokens == 65
    explorer = open_explorer(name, runs=tmp_path, out=tmp_path)
    assert explorer.rows[0].painter.scores == []
    assert subject.note in explorer.rows[0].figures.value
    explorer.threshold.value = 1.0
    explorer.rows[0].painter.painted = [1] * 16
    assert explorer.states[0].tokens == 17


def test_three_scales_are_refused_with_a_reason(tmp_path):
    model = mini_model()
    model.gate = make_rule("entropy", scales=3)
    with pytest.raises(ModelError, match="mine has a rule of three scales"):
        gallery.describe("mine", model)
    model.save_pretrained(tmp_path / "three")
    explorer = open_explorer(gallery.describe("mini", mini_model()), runs=tmp_path, out=tmp_path)
    explorer.model.value = "three"
    assert "three has a rule of three scales" in explorer.message.value
    assert "delete" not in explorer.message.value
    assert explorer.model.value == "mini"


@pytest.mark.parametrize(
    ("settings", "said"), [({"gating": "oracle"}, "oracle"), ({"epochs": 0}, "dense stage"), ({}, "")]
)
def test_what_a_gate_has_not_learned_is_said(settings, said, tmp_path):
    records = RunFolder(tmp_path / "run")
    records.open(Recipe(**settings))
    records.save_model(mini_model())
    records.close()
    note = gallery.load_model("run", tmp_path).note
    assert (said in note and "untrained" in note) if said else note == ""


# ---- the clock


def test_the_dense_model_has_the_same_linear_layers(monkeypatch):
    """Its milliseconds stand beside the gated model's, which runs within `fast_linear`."""
    within, depth = [], []

    class Watched:
        def __enter__(self):
            depth.append(1)

        def __exit__(self, *_):
            depth.pop()

    subject = gallery.describe("mini", mini_model())
    subject.model.vit.head.register_forward_hook(lambda *_: within.append(bool(depth)))
    monkeypatch.setattr(gallery, "fast_linear", Watched)
    assert subject.dense_ms > 0
    assert within
    assert all(within)


@pytest.mark.parametrize("decoder", ["linear", "mask"])
def test_a_dense_segmenter_is_the_model_with_all_tokens_fine(decoder):
    torch.manual_seed(0)
    vit = timm.create_model("vit_mini_patch8_64", num_classes=0)
    model = segmenting(msvit.MSViT(vit), 5, decoder).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode(), fast_linear():
        fine = model.run(images, torch.zeros(4, 4, dtype=torch.bool)).logits
        assert torch.allclose(gallery.run_dense(model, images), fine, atol=1e-4)
