"""What a gate could win and what it has learned, against plain loops and closed forms."""

import itertools

import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from helpers import shake

from msvit import MSViT
from msvit.data.loaders import make_loaders
from msvit.studies import gate_learning as study


@pytest.fixture
def model(make_vit):
    return MSViT(shake(make_vit(depth=2, embed_dim=32))).eval()


@pytest.fixture
def pictures(model):
    batch = next(iter(make_loaders("scenes:easy", train_n=128, val_n=8, val_batch=8).val))
    return batch.images[:3, :, :32, :48], batch.targets[:3]


def loss_of(model, image, target, mask):
    with torch.no_grad():
        return F.cross_entropy(model.run(image[None], mask).logits, target[None]).item()


def test_answers_are_those_of_single_runs(model, pictures):
    images, targets = pictures
    masks = torch.rand(3, 5, 2, 3) > 0.5
    found = study.answer(model.train(), images, targets, masks, batch=4)
    assert model.training
    model.eval()
    for b, k in itertools.product(range(3), range(5)):
        assert found.loss[b, k] == pytest.approx(loss_of(model, images[b], targets[b], masks[b, k]), abs=1e-5)
    right = [[(model.run(images[b][None], m).logits.argmax() == targets[b]).item() for m in masks[b]] for b in range(3)]
    assert found.right.tolist() == right


def test_a_flip_is_the_difference_of_two_runs(model, pictures):
    images, targets = pictures
    masks = torch.rand(3, 2, 3) > 0.5
    found = study.flips(model, images, targets, masks)
    for b, r, c in itertools.product(range(3), range(2), range(3)):
        coarse, fine = masks[b].clone(), masks[b].clone()
        coarse[r, c], fine[r, c] = True, False
        expected = loss_of(model, images[b], targets[b], coarse) - loss_of(model, images[b], targets[b], fine)
        assert found[b, r, c] == pytest.approx(expected, abs=2e-6)
    assert found.abs().max() > 1e-4


def test_the_search_takes_the_cheapest_region_each_time(model, pictures):
    images, targets = pictures
    found = study.greedy(model, images, targets, 3)
    for b in range(3):
        mask = torch.zeros(6, dtype=torch.bool)
        for _ in range(3):
            left = (~mask).nonzero()[:, 0].tolist()
            tries = {i: loss_of(model, images[b], targets[b], (mask | (torch.arange(6) == i)).view(2, 3)) for i in left}
            mask[min(tries, key=tries.get)] = True
        assert found[b].flatten().tolist() == mask.tolist()


def test_random_masks_have_so_many_coarse_regions_and_every_region_is_as_likely():
    masks = study.random_masks(50, 200, (2, 3), 4)
    assert (masks.sum((-1, -2)) == 4).all()
    assert (masks.float().mean((0, 1)) - 4 / 6).abs().max() < 0.03
    assert torch.equal(masks, study.random_masks(50, 200, (2, 3), 4))


def test_rank_correlation_is_spearmans():
    a, b = torch.randn(4, 5, 6), torch.randint(3, (4, 5, 6)).float()
    expected = [scipy.stats.spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    assert study.rank_correlation(a, b).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_gradient_of_many_draws_is_that_of_each(model, pictures):
    images, targets = pictures
    mean, spread = study.gradient_signal(model, images, targets, draws=5, seed=7)
    torch.manual_seed(7)
    model.gate.train()
    pulls = []
    for _ in range(5):
        result = model.run(images, execution="masked")
        F.cross_entropy(result.logits, targets, reduction="sum").backward(inputs=[result.scores])
        pulls.append(result.scores.grad)
    torch.testing.assert_close(mean, torch.stack(pulls).mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(spread, torch.stack(pulls).std(0), rtol=1e-4, atol=1e-6)
    assert spread.min() > 0


def test_winnings_are_in_the_order_of_what_their_choosers_know(model, pictures):
    images, targets = pictures
    scores = {"gate": model.gate(images).detach(), "nothing": torch.rand(3, 2, 3)}
    table = study.winnings(model, images, targets, scores, n_coarse=3, draws=20)
    assert list(table.index) == ["all fine", "random", "gate", "nothing", "best of 20 random", "greedy search"]
    assert table["accuracy"].between(0, 1).all()
    every = [list(p) for p in itertools.combinations(range(6), 3)]
    masks = torch.zeros(len(every), 6, dtype=torch.bool).scatter(1, torch.tensor(every), True).view(1, -1, 2, 3)
    least = study.answer(model, images, targets, masks.expand(3, -1, -1, -1)).loss.min(1).values.mean().item()
    assert least <= table.loc["greedy search", "loss"] + 1e-6
    assert least <= table.loc["best of 20 random", "loss"] + 1e-6
    assert table.loc["best of 20 random", "loss"] < table.loc["random", "loss"]
    assert table.loc["random", "loss_sd"] > 0


def test_scores_are_high_where_a_region_shall_be_coarse(model, pictures):
    images, _ = pictures
    loaders = make_loaders("scenes:easy", train_n=128, val_n=8)
    objects = torch.zeros(3, 2, 3, dtype=torch.bool)
    objects[:, 0, 0] = True
    scores = study.scores_of(model, loaders, images, objects)
    assert list(scores) == ["gate", "entropy", "centre", "object"]
    assert (scores["object"][:, 0, 0] == 0).all()
    assert (scores["centre"][:, :, 1] < scores["centre"][:, :, 0]).all()
    flat = images.clone()
    flat[:, :, :16, :16] = 0
    assert (study.scores_of(model, loaders, flat)["entropy"][:, 0, 0] >= scores["entropy"][:, 0, 0]).all()
