"""What the explorer computes: tokens, MACs and figures of a picture under a threshold, a budget and a painting."""

import numpy as np
import pytest
import timm
import torch
from helpers import gate_of, reduced
from PIL import Image

import msvit
from msvit.data.scenes import Scenes
from msvit.explorer import drawing, export, panels
from msvit.explorer.models import LoadedModel
from msvit.explorer.painting import UNPAINTED
from msvit.explorer.sources import Picture
from msvit.explorer.state import pixels_of_tokens, run_backbone, run_gate

GREY = (120, 130, 140)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.55, 1.0])
def test_the_view_is_what_the_model_computes(loaded, gated, threshold):
    loaded.model.threshold = threshold
    with torch.inference_mode():
        result = loaded.model.run(gated.pixels)
    state = run_backbone(gated, threshold)
    assert np.array_equal(state.coarse, result.coarse[0].numpy())
    assert np.allclose(gated.scores, result.scores[0].numpy())
    assert np.allclose(gated.soft, result.gates[0].numpy())
    assert state.tokens == result.tokens.item()
    assert state.macs == result.macs.item()
    assert np.allclose(state.probabilities, result.logits[0].softmax(0).numpy(), atol=1e-6)


def test_painting_overrules_the_gate(gated):
    unpainted = run_backbone(gated, 0.5)
    painted = np.full(gated.soft.shape, UNPAINTED)
    painted[0], painted[3, 3] = 1, 0
    state = run_backbone(gated, 0.5, painted)
    assert state.coarse[0].all()
    assert not state.coarse[3, 3]
    free = painted == UNPAINTED
    assert np.array_equal(state.coarse[free], unpainted.coarse[free])
    assert state.tokens == 1 + state.coarse.sum() + 4 * (~state.coarse).sum()


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9])
def test_a_budget_is_met_as_nearly_as_regions_allow(gated, share):
    """With all m distinct any number of coarse regions can be had, so the error is at most half a region's cost."""
    counts = torch.arange(gated.soft.size + 1)
    shares = gated.loaded.model.macs_of(counts, (64, 64)).numpy() / gated.loaded.model.dense_macs((64, 64))
    reached = gated.share(gated.threshold_for(share))
    assert len(np.unique(gated.soft)) == gated.soft.size
    assert abs(reached - share) == pytest.approx(np.abs(shares - share).min())
    assert run_backbone(gated, gated.threshold_for(share)).numbers()["macs_share"] == pytest.approx(reached)


def test_the_gate_runs_once_for_all_thresholds(loaded, gated):
    calls = []
    loaded.model.gate.register_forward_hook(lambda *_: calls.append(1))
    for threshold in (0.2, 0.5, 0.8):
        run_backbone(gated, threshold)
    assert not calls


def test_coarse_regions_are_really_coarse(loaded, gated):
    painted = np.zeros(gated.soft.shape, int)
    painted[1, 2] = 1
    seen = pixels_of_tokens(run_backbone(gated, 0.5, painted))
    image = np.asarray(gated.picture.image)
    outside = np.ones((64, 64), bool)
    outside[16:32, 32:48] = False
    assert np.array_equal(seen[outside], image[outside])
    blocks = seen[16:32, 32:48].reshape(8, 2, 8, 2, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    pooled = torch.nn.functional.avg_pool2d(gated.pixels, 2)[0, :, 8:16, 16:24].permute(1, 2, 0).numpy()
    assert np.abs((pooled * loaded.std + loaded.mean) * 255 - blocks[:, 0, :, 0]).max() <= 0.51


def test_a_picture_that_is_not_square():
    model = msvit.MSViT(timm.create_model("vit_mini_patch8_64", img_size=(48, 96))).eval()
    loaded = LoadedModel.of("wide", model)
    state = run_backbone(run_gate(loaded, Picture("grey", Image.new("RGB", (96, 48), GREY))), 0.5)
    assert loaded.size == (48, 96)
    assert state.coarse.shape == (3, 6)
    assert panels.picture_panel(state).size == (drawing.PANEL_WIDTH, drawing.PANEL_WIDTH // 2)
    assert export.as_png([state])


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_a_segmentation_is_what_the_model_computes(segmenter, threshold):
    gated = gate_of(segmenter)
    segmenter.model.threshold = threshold
    with torch.inference_mode():
        result = segmenter.model.run(gated.pixels)
    state = run_backbone(gated, threshold)
    assert np.array_equal(state.labels, result.logits[0].argmax(0).numpy())
    assert len(np.unique(state.labels)) > 1
    assert (state.tokens, state.macs) == (result.tokens.item(), result.macs.item())


def test_the_figures_of_a_segmentation(segmenter):
    gated = gate_of(segmenter)
    mask = Scenes(2, difficulty="easy", split="val").mask(1)
    assert np.array_equal(gated.truth, mask)
    state = run_backbone(gated, 0.5)
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
    assert f"{n['accuracy']:.1%} of pixels right</b> mean IoU {n['miou']:.1%}" in export.figures_html(state)


@pytest.mark.parametrize("name", ["evit", "token_pooling", "tome", "grid", "dynamicvit", "random_pruning"])
def test_stages_are_those_of_the_model(name):
    loaded = reduced(name)
    gated = gate_of(loaded)
    state = run_backbone(gated, 0.5)
    with torch.inference_mode():
        result = loaded.model.run(gated.pixels, mask=torch.from_numpy(state.coarse))
    numbers = state.numbers()["stages"]
    assert [stage["layer"] for stage in numbers] == [stage.layer for stage in result.stages]
    assert [stage["tokens"] for stage in numbers] == [int(stage.kept) for stage in result.stages]
    assert [stage["dropped"] for stage in numbers] == [int((stage.where < 0).sum()) for stage in result.stages]
    assert numbers[0] == {"layer": None, "tokens": state.tokens - 1, "dropped": 0}
    assert numbers[-1]["tokens"] == len(np.unique(state.token_map.where[state.token_map.where >= 0]))
    left = f", {1 + numbers[-1]['tokens']} left at block {loaded.model.reducer.layers[-1]}  ·"
    assert left in export.caption(state)[1]


@pytest.mark.parametrize("settings", [{}, {"threshold": 0.5}])
def test_a_budget_counts_what_a_reducer_saves(settings):
    """Where the counts depend on what the picture shows, the model is run for them."""
    loaded = reduced("dynamicvit", keep=0.7, layers=[1], **settings)
    assert loaded.model.adaptive == bool(settings)
    gated = gate_of(loaded)
    target = (gated.share(0.0) + gated.share(1.0)) / 2
    assert gated.share(1.0) - gated.share(0.0) > 0.2
    state = run_backbone(gated, gated.threshold_for(target))
    assert state.numbers()["macs_share"] == pytest.approx(gated.share(state.threshold))
    assert state.numbers()["macs_share"] == pytest.approx(target, abs=0.04)
    loaded.model.threshold = state.threshold
    with torch.inference_mode():
        assert state.macs == loaded.model.run(gated.pixels).macs.item()
