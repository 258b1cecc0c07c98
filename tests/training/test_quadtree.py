"""Runs of more than two scales: a budget over all sizes of regions, a loss for each, rules, the oracle, and records."""

import math

import pytest
import torch

import msvit
from msvit.data.loaders import Batch, make_loaders
from msvit.data.scenes import DIFFICULTIES
from msvit.evaluation.predictions import object_finder, oracle_masks
from msvit.gating.gate import Quadtree
from msvit.gating.losses import GBaS, LevelLosses
from msvit.training.budget import Budget
from msvit.training.build import build
from msvit.training.evaluate_run import evaluate_run
from msvit.training.loop import train
from msvit.training.objectives import Gated
from msvit.training.recipe import Recipe, RecipeError, parse
from msvit.training.teach_gate import asked_rates, detail, teach_gate

SMALL = Recipe(
    data="scenes:scales", train_n=64, val_n=32, batch=32, epochs_dense=0, epochs=1, scales=[1, 2, 4], device="cpu",
    gate_start="detail",
)  # fmt: skip
SIZE = (64, 64)


@pytest.fixture(scope="module")
def loaders():
    return make_loaders("scenes:scales", size=64, train_n=128, val_n=64, batch=32)


def new_model(recipe=SMALL):
    torch.manual_seed(0)
    return build(recipe, None)


@pytest.mark.parametrize("by", ["learned", "random"])
@pytest.mark.parametrize("target", [0.3, 0.6])
def test_one_budget_is_split_over_all_sizes(loaders, by, target):
    model, gating = new_model(), SMALL.replace(gating=by, target=target).gating
    budget = Budget(model, SIZE, gating, loaders)
    assert budget.grids == [(4, 4), (2, 2)]
    assert 0 < budget.rates[1] <= budget.rates[0] < 1
    counts = [torch.tensor([rate * math.prod(grid)]) for rate, grid in zip(budget.rates, budget.grids, strict=True)]
    assert budget.macs == model.macs_of(counts, SIZE).item() / model.dense_macs(SIZE)
    assert budget.macs == pytest.approx(target, abs=0.03)
    if by == "random":
        assert 1 - budget.rates[0] == pytest.approx((1 - budget.rates[1]) ** 2)


def test_a_target_for_each_size(loaders):
    budget = Budget(new_model(), SIZE, SMALL.replace(targets=[0.7, 0.4]).gating, loaders)
    assert budget.rates == [0.7, 0.4]
    assert asked_rates([0.7, 0.4]) == pytest.approx([0.5, 0.4])


@pytest.mark.long
@pytest.mark.parametrize("rates", [[0.8, 0.6]])
def test_gates_are_taught_from_the_largest_regions_down(loaders, rates):
    """Each follows what averaging its regions loses; the shares of undivided regions are those asked for."""
    model = new_model()
    teach_gate(model, loaders, rates, "detail", seed=0)
    images = torch.cat([batch.images for batch in loaders.first_pictures()])
    with torch.no_grad():
        gating = model.eval().decide(images, everywhere=True)
    for level, (decided, u, rate) in enumerate(zip(gating.levels, gating.undivided, rates, strict=True)):
        lost = detail(images, model, loaders, level)
        assert torch.corrcoef(torch.stack([decided.scores.flatten(), -lost.flatten()]))[0, 1] > 0.7
        assert u.mean().item() == pytest.approx(rate, abs=0.02)


def test_detail_of_a_larger_size_by_loops():
    model, images = new_model(), torch.randn(2, 3, 64, 96)
    found = detail(images, model, None, 1)
    for b in range(2):
        for at in range(6):
            y, x = 32 * (at // 3), 32 * (at % 3)
            part = images[b, :, y : y + 32, x : x + 32]
            means = part.reshape(3, 8, 4, 8, 4).mean((2, 4)).repeat_interleave(4, 1).repeat_interleave(4, 2)
            assert found[b, at].item() == pytest.approx(((part - means).square().mean() + 1e-4).log().item(), abs=1e-4)


@pytest.mark.parametrize("control", ["none", "projection"])
def test_each_size_has_its_loss_and_its_controller(loaders, control):
    recipe = SMALL.replace(targets=[0.7, 0.4], control=control)
    model = new_model(recipe)
    this = Gated(model, recipe, Budget(model, SIZE, recipe.gating, loaders)).train()
    assert isinstance(this.loss, LevelLosses)
    assert [(type(loss), loss.grid, loss.target) for loss in this.loss.levels] == [
        (GBaS, (4, 4), 0.7),
        (GBaS, (2, 2), 0.4),
    ]
    this.groups()
    batch = Batch(*next(iter(loaders.train)))
    out = this(*batch)
    out.loss.backward()
    for gate in model.gate.levels:
        assert all(p.grad.abs().sum() > 0 for p in gate.parameters())
    assert all(loss.logits.grad.abs().sum() > 0 for loss in this.loss.levels)
    if control == "none":
        assert out.gate_error is None
        return
    assert out.gate_error.shape == (2,)
    before = [gate.bias.item() for gate in model.gate.levels]
    this.update([1.0, -2.0])
    moved = [gate.bias.item() - b for gate, b in zip(model.gate.levels, before, strict=True)]
    assert moved == pytest.approx([-this.controllers[0].STEP, 2 * this.controllers[1].STEP], abs=1e-6)


def test_the_oracle_divides_what_would_lose_the_texture(loaders):
    model, batch = new_model(), next(iter(loaders.val))
    masks = oracle_masks(model, object_finder(loaders.val), batch.indices, SIZE)
    details = torch.tensor(DIFFICULTIES["scales"].details)[batch.targets]
    assert [tuple(mask.shape[1:]) for mask in masks] == [(4, 4), (2, 2)]
    for mask, side in zip(masks, (2, 4), strict=True):
        assert torch.equal((~mask).any((1, 2)), details < side)


@pytest.mark.long
@pytest.mark.parametrize("gating", ["learned", "oracle", "entropy", "psnr", "equality", "random", "fine"])
def test_a_run_from_end_to_end(tmp_path, gating):
    recipe = SMALL.replace(gating=gating)
    run = train(recipe, tmp_path / "run", progress=False)
    model = msvit.MSViT.from_pretrained(run.folder)
    assert model.scales == (1, 2, 4)
    assert isinstance(model.gate, Quadtree) == (gating in ("learned", "oracle"))
    found = evaluate_run(run.folder)
    assert found["macs"] == pytest.approx(run.summary["macs"], abs=1e-9)
    if gating in ("learned", "entropy"):
        assert found["macs"] == pytest.approx(recipe.gating.target, abs=0.08)
    if gating == "learned":
        assert evaluate_run(run.folder, macs=0.3)["macs"] < found["macs"]
        assert evaluate_run(run.folder, threshold=0.0)["tokens"] == 1 + 4
        again = train(recipe.replace(model=str(run.folder), epochs=1), tmp_path / "more", progress=False)
        assert again.summary["pictures"] == 32


def test_settings_are_read_and_refused(loaders):
    assert parse("scales", "1,2,4") == parse("scales", "[1, 2, 4]") == [1, 2, 4]
    assert Recipe.from_dict(SMALL.to_dict()) == SMALL
    for typed in ("1,2,x", "[1, 0.5]"):
        with pytest.raises(RecipeError, match=r"scales=.*expected numbers, as in 1,2,4 in \[1, 64\]"):
            parse("scales", typed)
    model = new_model()
    for changes, words in (
        ({"targets": [0.5]}, r"targets=\[0.5\]: give 2, one for each size"),
        ({"targets": [0.3, 0.5]}, "give falling numbers"),
        ({"budget": "coarse"}, "say targets, one share for each size, or budget='macs'"),
        ({"target": 0.01}, "target=0.01 cannot be met"),
    ):
        with pytest.raises(RecipeError, match=words):
            Budget(model, SIZE, SMALL.replace(**changes).gating, loaders)
    with pytest.raises(RecipeError, match=r"scales=\[1, 2, 6\].*|scales=\(1, 2, 6\)"):
        build(SMALL.replace(scales=[1, 2, 6]), None)
    with pytest.raises(RecipeError, match="gate decides about 1"):
        build(SMALL.replace(gating="pattern"), None)
    with pytest.raises(RecipeError, match=r"8 fine patches of 8 px does not fit into a picture of 32 x 32"):
        Budget(new_model(SMALL.replace(scales=[1, 2, 4, 8])), (32, 32), None)
