"""DiffRate: its probabilities, masks, counts and MACs in closed form, and the gradients of what it relaxes."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import shake

import msvit
from msvit.core.backbone import pooled_logits
from msvit.core.blocks import run_blocks
from msvit.core.macs import encoder_macs, token_counts
from msvit.gating.rules import make_rule
from msvit.reducers import diffrate
from msvit.reducers.diffrate import DiffRate, tilted
from msvit.reducers.registry import make_reducer
from msvit.reducers.tome import most_similar

# DeiT-S at 2.905 GMACs as published: tokens left by pruning and by merging in each block, the class token counted.
PRUNED = [197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3]
MERGED = [197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3]


def built(vit, **settings):
    return msvit.MSViT(vit, gate=make_rule("fine"), reducer=make_reducer("diffrate", vit, **settings))


def candidates(patches, granularity):
    return [patches - c * granularity for c in range(patches) if patches - c * granularity > 0]


@pytest.mark.parametrize("granularity", [1, 4, 5])
def test_probabilities_are_their_definition(tiny_vit, granularity):
    """Expectations and numbers; and the masks, whose gradient is that of the probability that a rank stays."""
    reducer = DiffRate(tiny_vit, granularity=granularity).double()
    kept = candidates(64, granularity)
    with torch.no_grad():
        reducer.rates.copy_(2 * torch.randn_like(reducer.rates))
    rho = reducer.rates.softmax(-1)
    expected = sum(rho[..., c] * k for c, k in enumerate(kept))
    torch.testing.assert_close(reducer.expected(), expected)
    assert torch.equal(reducer.numbers(), expected.ceil().long())
    rank = torch.randperm(65)
    stays = torch.rand(65) < 0.5
    for kind in (0, 1):
        mask = reducer._mask(kind, 2, rank, stays)
        assert torch.equal(mask > 0.5, stays)
        assert set(mask.tolist()) <= {0.0, 1.0}
        stay = [sum(rho[kind, 1, c] for c, k in enumerate(kept) if k > r - 1) for r in rank.tolist()]
        pull = torch.randn(65).double()
        found, due = (
            torch.autograd.grad(x @ pull, reducer.rates, retain_graph=True)[0] for x in (mask, torch.stack(stay))
        )
        torch.testing.assert_close(found, due, rtol=1e-9, atol=1e-12)
        assert stay[rank.tolist().index(1)].item() == pytest.approx(1)  # one token at least


def test_rates_begin_at_the_numbers():
    """Half a token below, with the greatest entropy: logits on a line. The least candidate is only approached."""
    kept = torch.arange(64, 0, -4)
    numbers = torch.tensor([[64, 63, 40], [17, 5, 4]])
    logits = tilted(numbers, kept).double()
    found = (logits.softmax(-1) * kept).sum(-1)
    torch.testing.assert_close(found.flatten()[:5], numbers.flatten()[:5].double() - 0.5, rtol=0, atol=1e-3)
    assert found[1, 2].item() == pytest.approx(4, abs=1e-5)
    assert logits.diff(n=2).abs().max() < 1e-3
    assert torch.equal((found - 1e-4).ceil().long(), numbers)


def formula(depth, layers, patches, left, width=64):
    """MACs of blocks of MLP ratio 4 with one class token, of an embedding of 8 x 8 pixels and 8 classes."""
    n, total = patches + 1, patches * 192 * width + 8 * width
    for layer in range(depth):
        after = left[layers.index(layer)] + 1 if layer in layers else n
        total = total + 4 * n * width**2 + 2 * n**2 * width + 8 * after * width**2
        n = after
    return total


@pytest.mark.parametrize("layers", [[1, 2, 3], [0, 2]])
def test_the_share_of_macs_and_its_gradient(make_vit, layers):
    """The value is that of the model that runs; the gradient that of free numbers, by finite differences."""
    vit = make_vit(depth=4)
    settings = {"layers": layers, "numbers": [[50, 41, 20][: len(layers)], [44, 41, 9][: len(layers)]]}
    model = built(vit, **settings).double().eval()
    reducer, dense = model.reducer, formula(4, layers, 64, [64] * len(layers))
    result = model.run(torch.randn(1, 3, 64, 64).double())
    assert dense == model.dense_macs((64, 64))
    assert reducer.share().item() * dense == pytest.approx(result.macs.item(), rel=1e-12)
    assert torch.equal(result.macs, model.macs_of(torch.tensor([0]), (64, 64)))
    left = reducer.numbers().amin(0).cummin(0).values
    assert (result.counts[layers, 1, 0] - 1).tolist() == left.tolist()

    gradient = torch.autograd.grad(reducer.share(), reducer.rates)[0]
    rates, direction = reducer.rates.detach().clone(), torch.randn_like(reducer.rates)

    def relaxed(step):
        kept = torch.tensor(candidates(64, 4)).double()
        change = ((rates + step * direction).softmax(-1) - rates.softmax(-1)) @ kept
        return formula(4, layers, 64, (left + change.sum(0)).tolist()) / dense

    slope = (relaxed(1e-4) - relaxed(-1e-4)) / 2e-4
    assert (gradient * direction).sum().item() == pytest.approx(slope, rel=1e-6)


VARIANTS = [
    {},
    {"reg_tokens": 3, "init_values": 0.4},
    {"global_pool": "avg", "fc_norm": True},
]


@pytest.mark.parametrize("numbers", [[[45, 20], [33, 12]], [[45, 20], [60, 19]], [[64, 30], [31, 30]]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_masked_training_is_discarding_evaluation(make_vit, variant, numbers):
    """Logits, counts and the map, alone and behind decisions that leave each picture as many tokens as it has."""
    model = built(shake(make_vit(**variant)), numbers=numbers).double()
    images = torch.randn(4, 3, 64, 64).double()
    mask = torch.rand(4, 4, 4) < torch.tensor([0.0, 0.3, 0.6, 1.0])[:, None, None]
    for given in (None, mask):
        discarded = model.eval().run(images, given)
        for execution in ("packed", "trimmed", "masked"):
            hidden = model.train().run(images, given, execution)
            assert sum(hidden.final.layout.lengths) > sum(discarded.final.layout.lengths)
            assert (hidden.logits - discarded.logits).abs().max() <= 1e-6
            assert torch.equal(hidden.counts, discarded.counts)
            assert torch.equal(hidden.macs, discarded.macs)
            for a, b in zip(hidden.stages, discarded.stages, strict=True):
                assert torch.equal(a.where >= 0, b.where >= 0)
                assert torch.equal(a.kept, b.kept)
            painted = [
                final.paint(final.area if final.size is None else final.size, (64, 64))
                for final in (hidden.final, discarded.final)
            ]
            torch.testing.assert_close(*painted, equal_nan=True)
    assert (discarded.logits - model.vit.eval()(images)).abs().max() > 1e-3


@pytest.fixture
def relaxed_network(make_vit, monkeypatch):
    """A function that returns a model that learns its rates, and the task's loss by the tokens' activity.

    What each merged token is like is found once: neither its target nor its share in the size has a gradient.
    """

    def make(**variant):
        vit = shake(make_vit(img_size=32, **variant))
        settings = {"numbers": [[12, 8], [10, 5]], "granularity": 1, "layers": [0, 1]}
        model = built(vit, **settings).double().train()
        images = torch.randn(2, 3, 32, 32).double()
        tokens, found = model.tokenize(images, model.decide(images), "packed"), []

        def loss(activity):
            again, first = iter(found), not found

            def recorded(*args):
                return found.append(most_similar(*args)) or found[-1] if first else next(again)

            monkeypatch.setattr(diffrate, "most_similar", recorded)
            final = run_blocks(vit, replace(tokens, activity=activity), model.reducer).final
            return F.cross_entropy(pooled_logits(vit, final), torch.arange(2))

        return model, loss, torch.ones(len(tokens.x), dtype=torch.float64, requires_grad=True)

    return make


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_rates_learn_as_finite_differences_say(relaxed_network, monkeypatch, variant):
    """Of the task's loss by masks that are off by as much as the probabilities change."""
    model, loss, ones = relaxed_network(**variant)
    rates = model.reducer.rates
    gradient = torch.autograd.grad(loss(ones), rates)[0]
    at, masks = rates.detach().clone(), []
    monkeypatch.setattr(diffrate, "with_gradient_of", lambda soft, hard: masks.append(soft) or hard)
    with torch.no_grad():
        loss(ones)
    assert len(masks) == 4  # pruning and merging, in two blocks

    def relaxed(step):
        left = iter(masks)
        monkeypatch.setattr(diffrate, "with_gradient_of", lambda soft, hard: hard + soft - next(left))
        with torch.no_grad():
            rates.copy_(at + step)
            return loss(ones).item()

    for kind in (0, 1):
        for layer in (0, 1):
            step = torch.zeros_like(at)
            step[kind, layer] = 1e-3 * torch.randn_like(step[kind, layer])
            slope = (relaxed(step) - relaxed(-step)) / 2
            assert abs(slope) > 1e-11
            assert (gradient * step).sum().item() == pytest.approx(slope, rel=1e-4)


def test_a_gate_learns_beside_rates_as_finite_differences_say(relaxed_network):
    _, loss, ones = relaxed_network(reg_tokens=1)
    gradient = torch.autograd.grad(loss(ones), ones)[0]
    for i in range(2, len(ones), 3):
        step = torch.zeros_like(ones).index_fill(0, torch.tensor([i]), 1e-5)
        with torch.no_grad():
            slope = (loss(ones + step) - loss(ones - step)).item() / 2e-5
        assert gradient[i].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_frozen_rates_discard_in_training(make_vit):
    model = built(shake(make_vit()), target=0.6)
    images = torch.randn(2, 3, 64, 64)
    expected = model.eval().run(images)
    model.reducer.rates.requires_grad_(False)
    result = model.train().run(images)
    assert result.final.layout.lengths == expected.final.layout.lengths
    torch.testing.assert_close(result.logits, expected.logits)
    assert model.reducer.loss(result) == {}


@pytest.mark.parametrize("begin", [{"target": 0.95}, {"numbers": [[20, 12, 9, 8, 8], [15, 9, 8, 7, 7]]}], ids=str)
@pytest.mark.parametrize("target", [0.5, 0.7])
def test_the_loss_alone_reaches_the_target(make_vit, begin, target):
    vit = make_vit(depth=6)
    reducer = make_reducer("diffrate", vit, **begin).train()
    reducer.target = target
    optimizer = torch.optim.Adam(reducer.parameters(), lr=0.05)
    assert abs(reducer.share().item() - target) > 0.05
    for _ in range(300):
        optimizer.zero_grad()
        reducer.loss(None)["budget"].backward()
        optimizer.step()
    assert reducer.share().item() == pytest.approx(target, abs=0.01)
    entering = torch.tensor([65])
    counts = token_counts(6, entering, reducer)
    assert counts[:, 1, 0].diff().max() <= 0
    dense = encoder_macs(vit, entering, token_counts(6, entering)).item() + 8 * 64
    found = (encoder_macs(vit, entering, counts, reducer).item() + 8 * 64) / dense
    assert found == pytest.approx(reducer.share().item(), rel=1e-9)


def test_the_loss_is_the_papers(tiny_vit):
    """In GMACs of DeiT-S it is 5 (F - T)²."""
    reducer = DiffRate(tiny_vit, target=0.6).train()
    reducer.target = 0.8
    gap = 4.6 * (reducer.share().item() - 0.8)
    assert reducer.loss(None)["budget"].item() == pytest.approx(5 * gap**2)
    assert reducer.loss(None).keys().isdisjoint({"loss", "task", "accuracy", "coarse", "macs"})  # a step's own scalars


@pytest.mark.parametrize("target", [0.55, 0.65, 0.8, 1.0])
def test_rates_begin_at_the_target(make_vit, target):
    reducer = DiffRate(make_vit(depth=8), target=target)
    assert reducer.share().item() == pytest.approx(target, abs=0.01)
    pruned, merged = reducer.numbers()
    assert (merged.diff() <= 0).all()
    before = torch.cat([torch.tensor([64]), merged[:-1]])
    assert ((before - pruned) - (pruned - merged)).abs().max() <= 1  # half of it each


def test_published_numbers_of_deit_small():
    vit = timm.create_model("deit_small_patch16_224")
    numbers = [[n - 1 for n in part] for part in (PRUNED, MERGED)]
    reducer = DiffRate(vit, granularity=2, layers=range(12), numbers=numbers)
    assert reducer.numbers().tolist() == numbers
    counts = token_counts(12, torch.tensor([197]), reducer)
    assert counts[:, 1, 0].tolist() == MERGED
    macs = encoder_macs(vit, torch.tensor([197]), counts).item() + 384 * 1000
    assert macs / 1e9 == pytest.approx(2.905, abs=0.001)
    own = sum(reducer.macs(i, counts[max(i - 1, 0), 1]).item() for i in range(12))
    assert own < 0.005 * macs


def test_a_block_that_may_keep_all_keeps_all_of_more(make_vit):
    """Of pictures with more patches than the backbone's own."""
    reducer = DiffRate(make_vit(), numbers=[[64, 64], [64, 20]])
    assert [reducer.count(layer, torch.tensor([145])).item() for layer in (1, 2)] == [145, 21]


def test_the_rates_do_not_decay(tiny_vit):
    assert DiffRate(tiny_vit).no_weight_decay() == {name for name, _ in DiffRate(tiny_vit).named_parameters()}


def test_saved_rates_are_the_learned(tmp_path):
    vit = timm.create_model("vit_mini_patch8_64")
    model = built(vit, target=0.7).eval()
    with torch.no_grad():
        model.reducer.rates.add_(torch.randn_like(model.reducer.rates))
    model.save_pretrained(tmp_path)
    again = msvit.MSViT.from_pretrained(tmp_path)
    assert torch.equal(again.reducer.numbers(), model.reducer.numbers())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images), model(images))
    assert not torch.equal(again.reducer.numbers(), built(vit, target=0.7).reducer.numbers())
