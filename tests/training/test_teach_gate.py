"""The warm start: a new gate knows what coarse tokens would lose before it decides anything."""

import copy

import pytest
import torch

from msvit.core.scales import enlarge
from msvit.core.tokens import patchify
from msvit.data.loaders import make_loaders
from msvit.training.build import build, takes_over_gate
from msvit.training.loop import train
from msvit.training.recipe import Recipe
from msvit.training.teach_gate import SCORES, SLOPE, detail, teach_gate

SMALL = Recipe(data="scenes:middle", train_n=256, val_n=64, batch=64, epochs_dense=1, epochs=1)


@pytest.fixture(scope="module")
def loaders():
    return make_loaders("scenes:middle", train_n=1024, val_n=256)


def new_model():
    torch.manual_seed(0)
    return build(SMALL, None)


def test_detail_is_what_averaging_throws_away():
    """By plain loops: the mean squared difference between a region and the means of its 2 x 2 pixels."""
    model, images = new_model(), torch.randn(2, 3, 64, 64)
    found = detail(images, model, None)
    for b in range(2):
        for region in range(16):
            y, x = 16 * (region // 4), 16 * (region % 4)
            part = images[b, :, y : y + 16, x : x + 16]
            means = part.reshape(3, 8, 2, 8, 2).mean((2, 4))
            lost = (part - enlarge(means, 2)).square().mean()
            assert found[b, region].item() == pytest.approx((lost + 1e-4).log().item(), abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(("by", "rate"), [("detail", 0.3), ("entropy", 0.7)])
def test_the_gate_follows_the_score_at_the_rate(loaders, by, rate):
    model = new_model()
    teach_gate(model, loaders, [rate], by, seed=0)
    images = next(iter(loaders.val)).images  # not the ones that it learned from
    with torch.no_grad():
        scores = model.eval().decide(images).scores.flatten()
    z = SCORES[by](images, model, loaders).flatten()
    assert torch.corrcoef(torch.stack([scores, -z]))[0, 1] > 0.7
    assert (scores > 0).float().mean().item() == pytest.approx(rate, abs=0.1)
    assert scores.std().item() == pytest.approx(SLOPE, rel=0.35)


def test_it_is_the_same_every_time_and_touches_the_gate_alone(loaders, monkeypatch):
    monkeypatch.setattr("msvit.training.teach_gate.SCORE_STEPS", 20)
    before = copy.deepcopy(new_model().state_dict())
    states = []
    for _ in range(2):
        model = new_model()
        torch.rand(3)  # whatever else was drawn
        teach_gate(model, loaders, [0.5], "detail", seed=3)
        states.append(model.state_dict())
    for name, value in before.items():
        assert torch.equal(states[0][name], states[1][name])
        assert torch.equal(states[0][name], value) != name.startswith(("gate.mlp", "gate.see"))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_utility_goes_as_far_from_its_start_as_the_masks_bear_out(loaders, monkeypatch, share):
    """Costs of masks that regions explain wholly teach what a region is worth; those of pure noise teach nothing."""

    def bright(images):
        return patchify(images, 16).mean(-1).view(-1, 4, 4)

    def costs(model, loaders, rates):
        while True:
            for batch in loaders.train:
                z = bright(batch.images)
                more = torch.randint(-1, 2, z.shape).float()
                regions = (more * (z - z.mean()) / z.std()).sum((1, 2)) / z[0].numel() ** 0.5
                yield batch.images, [more], share * regions + (1 - share) * torch.randn(len(z))

    monkeypatch.setattr("msvit.training.teach_gate._mask_costs", costs)
    images = next(iter(loaders.val)).images
    found = {}
    for by in ("detail", "utility"):
        model = new_model()
        teach_gate(model, loaders, [0.5], by, seed=0, steps=300)
        found[by] = model.gate(images).detach().flatten()
    likeness = torch.corrcoef(torch.stack([*found.values(), bright(images).flatten()]))[1]
    if share:
        assert likeness[2] > 0.8
    else:
        assert likeness[0] > 0.9


@pytest.mark.long
def test_only_a_gate_that_is_new_is_started(tmp_path, monkeypatch):
    """A gate that another run has trained is taken over as it is."""
    calls = []
    monkeypatch.setattr("msvit.training.loop.teach_gate", lambda *details: calls.append(details))
    recipe = SMALL.replace(gate_start="detail")
    first = train(recipe, tmp_path / "first", progress=False)
    assert len(calls) == 1
    more = recipe.replace(model=str(first.folder), epochs_dense=0)
    train(more, tmp_path / "more", progress=False)
    train(recipe.replace(gate=str(first.folder)), tmp_path / "taken", progress=False)
    train(recipe.replace(gating="random"), tmp_path / "rule", progress=False)
    assert len(calls) == 1
    train(recipe.replace(model=str(first.folder / "dense"), epochs_dense=0), tmp_path / "again", progress=False)
    train(recipe.replace(gate_lr=0.0), tmp_path / "fixed", progress=False)
    assert len(calls) == 3
    assert not takes_over_gate(SMALL.model, tmp_path)
