"""Models to choose from: runs, checkpoints, the demo, rules that replace the gate; and the dense model's time."""

import copy
import json

import numpy as np
import pytest
import timm
import torch
from helpers import COMMON, SEGMENTED, check_panels, gate_of, mini_model, open_explorer, segmenter_of, segmenting

import msvit
from msvit.core.fast_linear import fast_linear
from msvit.data.scenes import Scenes
from msvit.explorer import models
from msvit.explorer.models import LoadedModel, ModelError, find_models, load_model, run_dense
from msvit.explorer.panels import grid_panel
from msvit.explorer.sources import BuiltInSource
from msvit.explorer.state import pixels_of_tokens, run_backbone, run_gate
from msvit.gating.learned import Pattern, Quota
from msvit.gating.rules import make_rule
from msvit.models.shipped import card, shipped
from msvit.training.recipe import Recipe
from msvit.training.runs import RunFolder


def test_models_are_found_and_loaded(tmp_path):
    mini_model(1).save_pretrained(tmp_path / "runs/deep/one")
    (tmp_path / "runs/half").mkdir()
    (tmp_path / "runs/half/config.json").write_text("{}")
    runs = tmp_path / "runs"
    assert find_models(runs) == [*shipped(), "deep/one", "deit_tiny_patch16_224"]
    assert find_models(tmp_path / "none") == [*shipped(), "deit_tiny_patch16_224"]
    loaded = load_model("deep/one", runs)
    assert loaded.classes == tuple(f"class {i}" for i in range(8))
    assert load_model(str(runs / "deep/one"), "elsewhere").size == (64, 64)
    with pytest.raises(ModelError, match="holds no model that can be read"):
        load_model("half", runs)
    with pytest.raises(ModelError, match="model='' names nothing; there are "):
        load_model("", runs)
    with pytest.raises(ModelError, match="'nonsense' is neither shipped"):
        load_model("nonsense", runs)
    with pytest.raises(ModelError, match="resnet18: ResNet is no plain vision transformer"):
        load_model("resnet18", runs)
    (runs / "deep/one/model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="holds no model that can be read"):
        load_model("deep/one", runs)


def test_a_run_brings_its_classes_and_its_normalisation(tmp_path):
    records = RunFolder(tmp_path / "run")
    records.open(Recipe(data="scenes:middle"))
    records.save_model(mini_model())
    records.save_model(mini_model(), "dense")
    records.close()
    loaded = load_model("run", tmp_path)
    assert loaded.classes[4] == "wide rows"
    middle = Scenes(4, difficulty="middle", split="val")
    name = BuiltInSource("scenes:middle").names()[2]
    picture = BuiltInSource("scenes:middle").picture(name, (64, 64))
    assert torch.allclose(run_gate(loaded, picture).pixels[0], middle[2][0], atol=1e-5)
    assert name == f"#2 {picture.truth}"
    assert "untrained" in load_model("run/dense", tmp_path).note


def test_the_classes_of_a_run_from_anywhere_are_names_or_damage(tmp_path):
    records = RunFolder(tmp_path / "run")
    records.open(Recipe(data="tar:/nowhere"))
    records.save_model(mini_model())
    for text in ('{"classes": 3}', '{"classes": [1, 2, 3, 4, 5, 6, 7, "a\\n"]}'):
        records.write("summary.json", text.encode())
        assert all(name.isprintable() for name in load_model("run", tmp_path).classes)
    for text in ("[]", "{"):
        records.write("summary.json", text.encode())
        with pytest.raises(ModelError, match="summary.json is damaged"):
            load_model("run", tmp_path)
    records.close()


def test_a_shipped_model_brings_its_classes_and_its_normalisation(tmp_path):
    loaded, about = load_model("scenes", tmp_path), card("scenes")
    assert (loaded.classes, loaded.mean, loaded.std) == (about.classes, Scenes.mean, Scenes.std)
    assert about.title in loaded.note
    source = BuiltInSource("scenes:middle")
    states = [
        run_backbone(run_gate(loaded, source.picture(name, loaded.size)), loaded.model.threshold)
        for name in source.names()[:24]
    ]
    right = [state.numbers()["prediction"] == state.numbers()["truth"] for state in states]
    assert sum(right) >= 20


def test_a_run_of_segmentation_can_be_chosen(tmp_path):
    records = RunFolder(tmp_path / "run")
    records.open(Recipe(task="segment"))
    records.save_model(segmenter_of(decoder="linear"))
    records.save_model(segmenter_of(), "dense")
    records.close()
    assert find_models(tmp_path) == [*shipped(), "run", "run/dense", "deit_tiny_patch16_224"]
    loaded = load_model("run", tmp_path)
    assert loaded.segments
    assert loaded.classes == tuple(Scenes(1).regions)
    assert loaded.mean == Scenes.mean
    assert loaded.note == ""
    assert gate_of(loaded).truth is not None
    assert "untrained" in load_model("run/dense", tmp_path).note
    explorer = open_explorer("run", source="scenes: easy", runs=tmp_path, out=tmp_path / "out")
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
    assert numbers[0]["accuracy"] == pytest.approx(row.state.score["accuracy"])


@pytest.mark.parametrize(
    ("name", "settings"), [("random", {"rate": 0.4}), ("centre", {}), ("entropy", {"thresholds": [4.0]})]
)
def test_a_rule_that_replaces_the_gate(name, settings, tmp_path):
    model = mini_model()
    model.gate = make_rule(name, **settings)
    model.save_pretrained(tmp_path / name)
    loaded = load_model(name, tmp_path)
    assert "no gate: the rule" in loaded.note
    assert name in loaded.note.lower()
    gated = gate_of(loaded)
    assert gated.scores is None
    with torch.inference_mode():
        result = loaded.model.run(gated.pixels)
    state = run_backbone(gated, loaded.model.threshold)
    assert np.array_equal(state.coarse, result.coarse[0].numpy())
    assert state.macs == result.macs.item()
    assert state.numbers()["scores"] is None
    assert np.allclose(state.numbers()["soft"], result.gates[0])
    assert run_backbone(gated, gated.threshold_for(1.0)).tokens == 65
    explorer = open_explorer(name, runs=tmp_path, out=tmp_path)
    assert explorer.rows[0].painter.scores == []
    assert loaded.note in explorer.rows[0].figures.value
    explorer.threshold.value = 1.0
    explorer.rows[0].painter.painted = [1] * 16
    assert explorer.states[0].tokens == 17


@pytest.mark.parametrize("gate", [Quota(16, rate=0.4), Pattern((4, 4), 16)], ids=lambda gate: type(gate).__name__)
def test_what_learns_in_the_gates_place_is_shown_as_it_decides(gate):
    model = mini_model()
    model.gate = copy.deepcopy(gate).eval()
    if isinstance(gate, Pattern):
        model.gate.weight.data.normal_()
    gated = gate_of(LoadedModel.of("mini", model))
    with torch.no_grad():
        assert np.array_equal(gated.decisions(model.threshold), model.run(gated.pixels).coarse[0])
    assert ("40% of the regions" in gated.loaded.note) == isinstance(gate, Quota)
    check_panels(gated, [*COMMON, "Class probabilities"])


def test_three_scales_are_shown_and_painted():
    """A painted block is one token; with one of its quarters painted fine it is three coarse ones and four."""
    model = msvit.MSViT(mini_model().vit, scales=(1, 2, 4)).eval()
    gated = gate_of(LoadedModel.of("mine", model))
    for threshold in (0.0, model.threshold, 1.0):
        state = run_backbone(gated, threshold)
        model.threshold = threshold
        result = model.run(gated.pixels)
        assert np.array_equal(state.coarse, result.coarse[0])
        assert (state.tokens, state.macs) == (result.tokens.item(), result.macs.item())
        assert gated.share(threshold) == pytest.approx(state.macs / model.dense_macs((64, 64)))
    painted = np.zeros((4, 4), int)
    painted[:2, 2:] = 2
    one = run_backbone(gated, 0.5, painted)
    assert one.levels.tolist() == painted.tolist()
    assert one.tokens == 1 + 48 + 1
    painted[0, 3] = 0
    four = run_backbone(gated, 0.5, painted)
    assert four.levels[:2, 2:].tolist() == [[1, 0], [1, 1]]
    assert four.tokens == 1 + 48 + 3 + 4
    seen = pixels_of_tokens(one)[:32, 32:].reshape(8, 4, 8, 4, 3)
    assert (seen == seen[:, :1, :, :1]).all()
    check_panels(gated, [*COMMON, "Class probabilities"])
    assert len(set(map(bytes, (np.asarray(grid_panel(state)) for state in (one, four))))) == 2
    cuts = np.unique(np.concatenate([gated.soft.ravel(), gated.larger[0].ravel()]))
    shares = np.array([gated.share(cut) for cut in (0, *cuts)])
    for share in (0.3, 0.5, 0.9):
        assert abs(gated.share(gated.threshold_for(share)) - share) == pytest.approx(np.abs(shares - share).min())


@pytest.mark.parametrize(
    ("settings", "reason"), [({"gating": "oracle"}, "oracle"), ({"epochs": 0}, "dense stage"), ({}, "")]
)
def test_an_untrained_gate_is_noted(settings, reason, tmp_path):
    records = RunFolder(tmp_path / "run")
    records.open(Recipe(**settings))
    records.save_model(mini_model())
    records.close()
    note = load_model("run", tmp_path).note
    assert (reason in note and "untrained" in note) if reason else note == ""


@pytest.mark.parametrize("fast_cpu", [False, True])
def test_the_dense_model_has_the_same_linear_layers(monkeypatch, fast_cpu):
    """Its milliseconds stand beside the gated model's, which runs within `fast_linear`."""
    within, depth = [], []

    class Watched:
        def __init__(self, on):
            assert on == fast_cpu

        def __enter__(self):
            depth.append(1)

        def __exit__(self, *_):
            depth.pop()

    loaded = LoadedModel.of("mini", mini_model())
    loaded.model.fast_cpu = fast_cpu
    loaded.model.vit.head.register_forward_hook(lambda *_: within.append(bool(depth)))
    monkeypatch.setattr(models, "fast_linear", Watched)
    loaded.run_dense()
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
        assert torch.allclose(run_dense(model, images), fine, atol=1e-4)
