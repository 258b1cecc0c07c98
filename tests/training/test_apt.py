"""APT as a run: its decisions, its path, and what trains."""

import pandas as pd
import pytest
import torch

import msvit
from msvit.gating.entropy import Entropy
from msvit.models.coarse import FullResolution
from msvit.studies import study
from msvit.training.evaluate_run import evaluate_run
from msvit.training.loop import train
from msvit.training.names import method_name
from msvit.training.recipe import Recipe, RecipeError

SMALL = Recipe(train_n=64, val_n=32, batch=32, epochs_dense=0, epochs=1, device="cpu")


def trained(recipe, folder):
    run = train(recipe, folder, progress=False)
    return run, msvit.MSViT.from_pretrained(folder)


@pytest.mark.parametrize("thresholds", [[5.5], [5.5, 5.0]])
def test_a_run_is_apt_at_a_budget(tmp_path, thresholds):
    run, model = trained(SMALL.replace(gating="apt", rule_settings={"thresholds": thresholds}), tmp_path / "run")
    assert isinstance(model.gate, Entropy)
    assert isinstance(model.coarse_embed, FullResolution)
    assert list(model.gate.thresholds) == thresholds
    assert model.coarse_embed.zero_conv.weight.abs().sum() > 0
    assert model.threshold != 0.5
    assert run.summary["macs"] == pytest.approx(SMALL.gating.target, abs=0.05)
    assert run.recipe.method == "apt"
    assert evaluate_run(run.folder)["macs"] == run.summary["macs"]


def test_without_calibration_thresholds_are_what_they_say(tmp_path):
    recipe = SMALL.replace(gating="apt", calibrate=False, rule_settings={"thresholds": [5.0]})
    model = trained(recipe, tmp_path / "run")[1]
    assert model.threshold == 0.5
    assert model.gate.thresholds == (5.0,)


@pytest.mark.parametrize(("lr", "coarse_lr"), [(0.0, 1e-3), (1e-3, 0.0)])
def test_the_path_has_a_learning_rate_of_its_own(tmp_path, lr, coarse_lr):
    start = train(SMALL.replace(epochs_dense=1, epochs=0), tmp_path / "dense", progress=False)
    dense = msvit.MSViT.from_pretrained(start.folder)
    recipe = SMALL.replace(model=str(start.folder), gating="apt", lr=lr, coarse_lr=coarse_lr)
    model = trained(recipe, tmp_path / "run")[1]
    pairs = zip(model.vit.parameters(), dense.vit.parameters(), strict=True)
    same = all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert same == (lr == 0)
    assert (model.coarse_embed.zero_conv.weight.abs().sum() > 0) == (coarse_lr > 0)


def test_a_run_that_starts_from_apt_goes_on_with_its_path(tmp_path):
    run, first = trained(SMALL.replace(gating="apt"), tmp_path / "first")
    second = trained(SMALL.replace(gating="apt", model=str(run.folder), coarse_lr=0.0), tmp_path / "second")[1]
    assert torch.equal(second.coarse_embed.zero_conv.weight, first.coarse_embed.zero_conv.weight)


def test_a_model_without_the_path_is_not_evaluated_as_apt(tmp_path):
    folder = trained(SMALL.replace(gating="entropy"), tmp_path / "run")[0].folder
    with pytest.raises(RecipeError, match=r"trained without APT's path; its rule alone is 'entropy'"):
        evaluate_run(folder, gating="apt")


def test_bad_settings_of_the_rule(tmp_path):
    with pytest.raises(RecipeError, match="entropy has no setting 'bits'"):
        train(SMALL.replace(gating="apt", rule_settings={"bits": 5.0}), tmp_path / "run", progress=False)


def test_its_name_in_tables():
    """A rule alone is a mask; APT is more."""
    rows = study.ablation(dict.fromkeys(study.PARTS, True), ["gbas"], ["entropy", "apt"])
    assert [row.label for row in rows] == ["MSViT", "entropy mask", "APT"]
    for row, expected in zip(rows, ["MSViT gbas", "entropy mask", "APT"], strict=True):
        assert method_name(pd.Series(SMALL.replace(**row.changes).to_dict())) == expected
    path = SMALL.replace(coarse_embed="apt").to_dict()
    assert method_name(pd.Series(path)) == "MSViT gbas, APT's path"
