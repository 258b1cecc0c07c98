"""Segmentation through the same engine as classification: what differs, and that nothing else does."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import msvit
from msvit.cli import main
from msvit.data.scenes import Scenes
from msvit.models.msvit import Result
from msvit.models.sliding import slide
from msvit.training.build import build, fit_head, load_data
from msvit.training.evaluate_run import evaluate_run
from msvit.training.loop import train
from msvit.training.objectives import Objective
from msvit.training.recipe import Recipe, RecipeError

# Four steps an epoch of a few milliseconds each.
SMALL = Recipe(
    task="segment", size=32, train_n=64, val_n=24, batch=16, epochs_dense=1, epochs=1, schedule="poly", device="cpu"
)
REGIONS = Scenes(8).regions


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run that several tests look at."""
    torch.manual_seed(0)
    return train(SMALL.replace(decoder="mask"), tmp_path_factory.mktemp("runs") / "seg", progress=False)


@pytest.fixture(scope="module")
def streets(tmp_path_factory):
    """A folder in CamVid's layout: six and two pictures of 50 x 70 px, the left half of one class, an ignored strip."""
    root, draw = tmp_path_factory.mktemp("streets"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for kind in ("images", "labels"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            labels = np.zeros((50, 70), np.uint8)
            labels[:, 35:], labels[:5] = 1, 2
            pixels = np.where(labels[..., None] == 1, 200, 50) + draw.integers(0, 40, (50, 70, 3))
            Image.fromarray(pixels.astype(np.uint8)).save(root / split / "images" / f"{i}.png")
            Image.fromarray(labels).save(root / split / "labels" / f"{i}.png")
    (root / "classes.json").write_text(json.dumps({"names": ["Left", "Right", "Void"]}))
    return root


def test_a_run_records_what_segmentation_is_judged_by(finished):
    assert [line["stage"] for line in finished.metrics] == ["dense", "gated"]
    summary = finished.summary
    assert {"miou", "accuracy", "band_accuracy", "boundary_fine", "fine", "macs", "gmacs", "gmacs_sd"} <= set(summary)
    assert list(summary["iou"]) == REGIONS
    assert summary["dense_miou"] == finished.metrics[0]["val_miou"]
    assert finished.metrics[0]["val_macs"] == 1.0
    assert finished.metrics[0]["val_fine"] == 1.0
    seen = [x for x in summary["iou"].values() if x is not None]
    assert summary["miou"] == pytest.approx(sum(seen) / len(seen))
    model = msvit.MSViT.from_pretrained(finished.folder)
    assert model.head.classes == REGIONS
    assert summary["dense_macs"] == model.dense_macs((32, 32))
    for line in finished.metrics:
        assert line["train_loss"] > 0
        assert line["lr"] < SMALL.training.lr / 2  # the polynomial schedule has gone down


def test_eval_finds_again_what_the_run_recorded(finished, capsys):
    found = evaluate_run(finished.folder)
    for name in ("miou", "accuracy", "band_accuracy", "macs", "boundary_fine"):
        assert found[name] == pytest.approx(finished.summary[name], rel=1e-6)
    assert main(["eval", str(finished.folder), "--gating", "coarse", "--json"]) == 0
    coarse = json.loads(capsys.readouterr().out)
    assert coarse["coarse"] == 1.0
    assert coarse["fine"] == 0.0
    assert main(["runs", str(finished.folder.parent)]) == 0
    assert "mIoU" in capsys.readouterr().out


def test_a_run_starts_from_another_with_its_decoder(finished, tmp_path):
    recipe = SMALL.replace(decoder="mask", model=str(finished.folder / "dense"), epochs_dense=0)
    start = msvit.MSViT.from_pretrained(finished.folder / "dense")
    model = build(recipe, tmp_path)
    fit_head(model, REGIONS, "segment", recipe.model)
    for key, value in start.state_dict().items():  # the dense stage has no gate to hand on: it has learned nothing yet
        assert torch.equal(model.state_dict()[key], value) or key.startswith("gate."), key
    recipe = recipe.replace(decoder="linear")
    other = build(recipe, tmp_path)
    fit_head(other, REGIONS, "segment", recipe.model)
    assert torch.equal(other.vit.pos_embed, start.vit.pos_embed)
    assert other.head.settings["decoder"] == "linear"


@pytest.mark.parametrize("gate_lr", [0.0, 1e-2])
@pytest.mark.long
def test_the_gate_may_come_from_classification(tmp_path, gate_lr):
    """Frozen, it is the same afterwards; trained on, it is not."""
    classes = SMALL.replace(task="classify", epochs_dense=0)
    train(classes, tmp_path / "classify", progress=False)
    gate = msvit.MSViT.from_pretrained(tmp_path / "classify").gate.state_dict()
    recipe = SMALL.replace(gate=str(tmp_path / "classify"), gate_lr=gate_lr)
    run = train(recipe, tmp_path / "segment", progress=False)
    after = msvit.MSViT.from_pretrained(run.folder).gate.state_dict()
    assert all(torch.equal(after[key], gate[key]) for key in gate) == (gate_lr == 0)


def test_loss_and_accuracy_leave_ignored_pixels_out(tmp_path):
    """And label 255 of a classifier stays a label."""
    recipe = SMALL.replace(smoothing=0.1)
    classifier, segmenter = build(recipe, tmp_path), build(recipe, tmp_path)
    fit_head(segmenter, list("abcd"), "segment", recipe.model)
    logits, target = torch.randn(2, 4, 6, 5), torch.randint(4, (2, 6, 5))
    target[torch.rand(2, 6, 5) < 0.4] = 255

    class Dense:
        dense = 100

    def scored(model, logits, target):
        result = Result(
            logits=logits,
            gates=None,
            scores=None,
            coarse=torch.zeros(2, 1, 1, dtype=torch.bool),
            tokens=None,
            macs=torch.full((2,), 50.0),
        )
        return Objective(model, recipe, Dense()).scored(result, target)

    known = target != 255
    found, pixels = scored(segmenter, logits, target), logits.movedim(1, -1)[known]
    assert found.loss.item() == pytest.approx(F.cross_entropy(pixels, target[known], label_smoothing=0.1).item())
    assert found.scalars["accuracy"].item() == pytest.approx((pixels.argmax(1) == target[known]).float().mean().item())
    logits, target = torch.randn(2, 300), torch.tensor([255, 7])
    logits[0, 255] = 9.0
    found = scored(classifier, logits, target)
    assert found.loss.item() == pytest.approx(F.cross_entropy(logits, target, label_smoothing=0.1).item())
    assert found.scalars["accuracy"].item() == 0.5


@pytest.mark.parametrize("sliding", [False, True])
@pytest.mark.long
def test_a_folder_with_crops_and_whole_pictures(streets, tmp_path, sliding):
    """Crops of 32 px, scaled and flipped; evaluated on 50 x 70 px with padding, whole or through windows."""
    recipe = SMALL.replace(data=f"folder:{streets}", augment="light", sliding=sliding, batch=2, train_n=0, epochs=2)
    run = train(recipe, tmp_path / "run", progress=False)
    assert list(run.summary["iou"]) == ["Left", "Right"]
    assert run.summary["pictures"] == 2
    model, val = (
        msvit.MSViT.from_pretrained(run.folder),
        load_data(recipe.data, recipe.training.seed, build(recipe, tmp_path)).val,
    )
    images, targets, _ = next(iter(val))
    assert images.shape == (2, 3, 50, 70)
    with torch.no_grad():
        result = slide(model, images, 32, 16) if sliding else model.run(images)
    known = targets != 255
    accuracy = (result.logits.argmax(1) == targets)[known].double().mean().item()
    assert run.summary["accuracy"] == pytest.approx(accuracy, abs=1e-6)
    assert run.summary["gmacs"] == pytest.approx(result.macs.mean().item() / 1e9)


@pytest.mark.long
def test_every_gating_and_a_reducer_that_merges(tmp_path):
    for gating in ("random", "oracle", "checkerboard"):
        run = train(SMALL.replace(gating=gating, epochs_dense=0), tmp_path / gating, progress=False)
        assert 0 < run.summary["fine"] < 1, gating
    assert run.summary["gmacs_sd"] == 0
    run = train(SMALL.replace(gating="fine", reducer="tome", epochs_dense=0), tmp_path / "tome", progress=False)
    assert run.summary["macs"] < 1


def test_the_study_shows_what_its_runs_recorded(finished, tmp_path):
    segstudy = pytest.importorskip("msvit.studies.segmentation", exc_type=ImportError)
    from matplotlib import pyplot as plt

    from msvit import plots

    rows = segstudy.rows(SMALL, [0.5, 0.7], ["random"])
    assert [row.label for row in rows] == [
        "all fine", "all coarse", "gate at 50%", "random at 50%", "gate at 70%", "random at 70%",
    ]  # fmt: skip
    better = finished.summary | {"miou": finished.summary["miou"] + 0.1, "iou": {"a": 0.5, "b": None}}
    first = finished.summary | {"iou": {"a": 0.3, "b": None}}
    table = pd.DataFrame([{"method": "gate at 50%", "seed": s} | x for s, x in enumerate((first, better))])
    summary = segstudy.summarise(table).loc["gate at 50%"]
    assert summary["seeds"] == 2
    assert summary["miou"] == pytest.approx(finished.summary["miou"] + 0.05)
    assert summary["miou ±"] == pytest.approx(0.1 / 2**0.5)
    assert segstudy.class_ious(table).loc["gate at 50%", "a"] == pytest.approx(0.4)
    assert segstudy.class_ious(table)["b"].isna().all()
    assert len(plots.quality(table).axes) == 3
    figure = segstudy.draw_pictures(finished.folder, 3)
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["tokens", "truth", "prediction", "error"]
    model, scenes = msvit.MSViT.from_pretrained(finished.folder), Scenes(24, 32, 0, "easy", "val")
    with torch.no_grad():
        result = model.run(scenes.batch([0, 1, 2])[0])
    wrong = (result.logits.argmax(1).numpy() != scenes.masks([0, 1, 2])).mean((1, 2)) * 100
    assert [axes.get_xlabel() for axes in figure.axes[9:]] == [f"{share:.1f} % wrong" for share in wrong]
    assert [axes.get_xlabel() for axes in figure.axes[:3]] == [f"{n} tokens" for n in result.tokens.tolist()]
    plt.close("all")


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"mixup": 0.2}, "mixup=0.2 is not for task='segment'"),
            ({"distill": 1.0}, "distill=1.0 is not for task='segment'"),
            ({"task": "classify", "sliding": True}, "sliding=True is not for task='classify'"),
            ({"decoder": "masks"}, "decoder='masks'.*the nearest is 'mask'"),
        ],
    )
    def test_settings(self, changes, match):
        with pytest.raises(RecipeError, match=match):
            SMALL.replace(**changes)

    def test_a_reducer_that_prunes(self, tmp_path):
        with pytest.raises(RecipeError, match="drops tokens"):
            train(SMALL.replace(reducer="dynamicvit"), tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()

    def test_a_crop_larger_than_the_picture(self, streets, tmp_path):
        recipe = SMALL.replace(data=f"folder:{streets}", size=64, batch=2, train_n=0)
        with pytest.raises(ValueError, match=r"size=\(64, 64\) is larger than .*\.png of \(50, 70\) pixels"):
            train(recipe, tmp_path / "run", progress=False)

    def test_missing_and_wrong_labels(self, streets, tmp_path):
        for name, match in (("labels/5.png", "no label map"), ("images", "there is no folder")):
            copy = tmp_path / name.replace("/", "-")
            for path in streets.rglob("*"):
                if path.is_file():
                    (copy / path.relative_to(streets)).parent.mkdir(parents=True, exist_ok=True)
                    (copy / path.relative_to(streets)).write_bytes(path.read_bytes())
            target = copy / "train" / name
            target.unlink() if target.is_file() else target.rename(copy / "elsewhere")
            with pytest.raises(RecipeError, match=match):
                train(SMALL.replace(data=f"folder:{copy}", batch=2), tmp_path / "run", progress=False)
