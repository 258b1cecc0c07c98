"""A gate for a frozen model: what masks cost the model teaches which regions need their fine tokens."""

import pandas as pd
import pytest
import torch
from torch import nn

import msvit
from msvit.cli import main
from msvit.data.loaders import make_loaders
from msvit.training.build import build
from msvit.training.files import RunError
from msvit.training.fit_gate import compare_with_dense, fit_gate
from msvit.training.loop import train
from msvit.training.recipe import Recipe, RecipeError
from msvit.training.teach_gate import divergence, teach_gate

SMALL = Recipe(data="scenes:easy", train_n=512, val_n=128, batch=64)


class Additive(nn.Module):
    """A stand-in for a trained model: an answer that loses, for each coarse region, by how bright the region is."""

    coarse_patch, scale, scales = 16, 2, (1, 2)

    def __init__(self):
        super().__init__()
        self.gate, self.cut = msvit.Gate(16), torch.tensor(0.5)

    grid, grids, all_fine = msvit.MSViT.grid, msvit.MSViT.grids, msvit.MSViT.all_fine
    evaluating = msvit.MSViT.evaluating

    @staticmethod
    def cost(images):
        return images.mean(1).unflatten(2, (-1, 16)).unflatten(1, (-1, 16)).mean((2, 4)).sigmoid()

    def run(self, images, masks):
        (mask,) = masks
        lost = (mask * self.cost(images)).sum((1, 2))
        logits = torch.stack([-lost, torch.zeros_like(lost)], 1)
        return msvit.Result(logits, None, None, mask, None, None)


@pytest.mark.long
def test_utility_finds_what_each_region_costs():
    """From random masks of whole pictures alone: the gate's scores rank regions as their costs do."""
    loaders = make_loaders("scenes:middle", train_n=1024, val_n=128, batch=64)
    torch.manual_seed(0)
    model = Additive()
    teach_gate(model, loaders, [0.5], "utility", seed=0, steps=250)
    images = next(iter(loaders.val)).images
    with torch.no_grad():
        scores, cost = model.gate.eval()(images).flatten(), model.cost(images).flatten()
    ranks = torch.stack([x.argsort().argsort().double() for x in (scores, -cost)])
    assert torch.corrcoef(ranks)[0, 1] > 0.8
    assert (scores > 0).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_divergence_is_the_mean_of_kl():
    p, q = torch.randn(3, 5), torch.randn(3, 5)
    expected = [(a.softmax(0) * (a.log_softmax(0) - b.log_softmax(0))).sum() for a, b in zip(p, q, strict=True)]
    torch.testing.assert_close(divergence(p, q), torch.stack(expected))
    assert divergence(p, p).abs().max() < 1e-6
    maps = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    pixels = divergence(*(x.permute(0, 2, 3, 1).reshape(-1, 3) for x in maps)).view(2, -1).mean(1)
    torch.testing.assert_close(divergence(*maps), pixels)


@pytest.mark.long
def test_a_fitted_gate_beats_random_decisions_and_leaves_the_backbone_alone(tmp_path):
    dense = train(SMALL.replace(train_n=4096, epochs_dense=2, epochs=0), tmp_path / "dense", progress=False)
    recipe = SMALL.replace(model=str(dense.folder), train_n=2048, target=0.6)
    table = fit_gate(recipe, tmp_path / "fitted", steps=150, progress=False).set_index("decisions")
    gate, random = table.loc["gate, taught by utility"], table.loc["random"]
    assert gate["divergence"] < 0.7 * random["divergence"]
    assert gate["accuracy"] > random["accuracy"]
    assert gate["macs"] == pytest.approx(0.6, abs=0.02)
    assert random["macs"] == pytest.approx(0.6, abs=0.02)
    written = pd.read_csv(tmp_path / "fitted" / "fit_gate.csv").set_index("decisions")
    pd.testing.assert_frame_equal(written, table)
    before, after = (msvit.MSViT.from_pretrained(path).vit.state_dict() for path in (dense.folder, tmp_path / "fitted"))
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_all_fine_agrees_with_itself_and_other_labels_are_left_out():
    model, loaders = build(SMALL, None), make_loaders(val_n=64)
    model.gate = msvit.make_rule("fine")
    found = compare_with_dense(model, loaders)
    assert found["agreement"] == 1
    assert found["divergence"] == pytest.approx(0, abs=1e-6)
    assert found["macs"] == pytest.approx(1)
    assert "accuracy" in found
    model.vit.reset_classifier(5)
    assert "accuracy" not in compare_with_dense(model, loaders)


def test_bad_input(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(RunError, match="full is not empty; name a new folder"):
        fit_gate(SMALL, tmp_path / "full")
    with pytest.raises(RecipeError, match="teaches the learned gate of a classifier"):
        fit_gate(SMALL.replace(gating="random"), tmp_path / "new")
    with pytest.raises(RecipeError, match="steps=0 lies outside"):
        fit_gate(SMALL, tmp_path / "new", steps=0)
    with pytest.raises(RecipeError, match="it has no classes"):
        fit_gate(SMALL.replace(model="vit_small_patch14_dinov2", size=28), tmp_path / "new")
    assert main(["fit-gate", "--model", "tiyn", "--folder", str(tmp_path / "new")]) == 2
    assert "'tiyn' is no model of timm" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_is_known_before_anything_is_learned(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("msvit.training.fit_gate.teach_gate", lambda *a: pytest.fail("taught"))
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/gated", tmp_path / ("x" * 300)):
        assert main(["fit-gate", "--folder", str(folder), "--batch", "8", "--val-n", "8", "--device", "cpu"]) == 1
        assert len(capsys.readouterr().err.splitlines()) == 1
